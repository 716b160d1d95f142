-- Asks for a history to be kept, or goes on with the one that is, and returns where it ends and its spans.
--
-- KEYS: the history's state, its spans. ARGV: events to keep of a channel, seconds, the server's run id.

local seconds, token, last, run = unpack(redis.call('HMGET', KEYS[1], 'seconds', 'token', 'seq', 'run'))
local now = redis.call('TIME')
local time = string.format('%.0f', now[1] * 1000000 + now[2])
if not token or run ~= ARGV[3] then
    local first = string.format('%.0f', math.max(tonumber(time), (tonumber(last) or 0) + 1))
    token = string.sub(redis.sha1hex(time .. (token or '') .. ARGV[3]), 1, 8)
    redis.call('ZADD', KEYS[2], first, token)
    redis.call('HSET', KEYS[1], 'token', token, 'run', ARGV[3])
    if not last then
        last = string.format('%.0f', first - 1)
        redis.call('HSET', KEYS[1], 'seq', last)
    end
end
-- What came before was kept for a shorter time, or not at all.
if not seconds or tonumber(seconds) < tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[1], 'since', last)
end
redis.call('HSET', KEYS[1], 'keep', ARGV[1], 'seconds', ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1001)
return {token, last, redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')}
