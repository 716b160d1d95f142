-- Asks for a history to be kept, or goes on with the one that is, and returns where it ends and its spans.
--
-- KEYS: the history's state, its spans. ARGV: events to keep of a channel, seconds, "1" when this script was not in the
-- server's cache, which server of a group this is; see publish.lua.

local keep, seconds, token, last, server =
    unpack(redis.call('HMGET', KEYS[1], 'keep', 'seconds', 'token', 'seq', 'server'))
local now = redis.call('TIME')
local time = now[1] * 1000000 + now[2]
local took_over = ARGV[4] ~= '' and server ~= ARGV[4]
if not token or ARGV[3] == '1' or took_over then
    token = string.sub(redis.sha1hex(string.format('%.0f', time) .. (token or '')), 1, 8)
    if took_over then
        redis.call('DEL', KEYS[2])
        redis.call('HSET', KEYS[1], 'server', ARGV[4])
    end
    redis.call('RPUSH', KEYS[2], token, string.format('%.0f', (last or time) + 1))
    redis.call('LTRIM', KEYS[2], -2000, -1)
    redis.call('HSET', KEYS[1], 'token', token)
end
-- See read.lua.
if not last then
    last = string.format('%.0f', time)
    redis.call('HSET', KEYS[1], 'seq', last)
elseif time - last > ARGV[2] * 125000 then
    if type(redis.pcall('HSET', KEYS[1], 'seq', string.format('%.0f', time))) == 'number' then
        last = string.format('%.0f', time)
    end
end
-- What came before was kept for a shorter time, or not at all.
if not seconds or tonumber(seconds) < tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[1], 'since', last)
end
if keep ~= ARGV[1] or seconds ~= ARGV[2] then
    redis.call('HSET', KEYS[1], 'keep', ARGV[1], 'seconds', ARGV[2])
end
return {token, last, redis.call('LRANGE', KEYS[2], 0, -1)}
