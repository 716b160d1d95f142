-- Publishes an event, and keeps it where a relay has asked for that.
--
-- KEYS: the history's state, its spans, the channel's events, the channel's own ids.
-- ARGV: channel, payload, id of the publisher's own or "", "1" when this script was not in the server's cache, and which
-- server of a group this is, or "" where there is no other.
--
-- A number is the time in microseconds, or the one before it plus one. A server that was started again does not have
-- this script in its cache, so its first event begins a new span, right behind the last event that it still has: what it
-- has lost is then not taken for what it has.
--
-- A server that takes over from another one cannot know what that had taken and not handed on yet: no place of before is
-- one to go on from, so the spans of before are forgotten.

local keep, seconds, token, last, server =
    unpack(redis.call('HMGET', KEYS[1], 'keep', 'seconds', 'token', 'seq', 'server'))
if not keep then
    return redis.call('PUBLISH', ARGV[1], ARGV[2])
end
if #ARGV[2] > 1048576 then
    return redis.error_reply('TOOLARGE the event is over 1 MiB')
end
local now = redis.call('TIME')
local time = now[1] * 1000000 + now[2]
local seq = string.format('%.0f', math.max(time, (tonumber(last) or 0) + 1))
local took_over = ARGV[5] ~= '' and server ~= ARGV[5]
if ARGV[4] == '1' or not token or took_over then
    token = string.sub(redis.sha1hex(seq .. (token or '') .. ARGV[2]), 1, 8)
    if took_over then
        redis.call('DEL', KEYS[2])
        redis.call('HSET', KEYS[1], 'server', ARGV[5])
    end
    redis.call('RPUSH', KEYS[2], token, last and string.format('%.0f', last + 1) or seq)
    redis.call('HSET', KEYS[1], 'token', token)
end
-- Each event names the one before it on its channel, so that a reader sees what was deleted in between.
local before = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
redis.call('XADD', KEYS[3], seq .. '-0',
    'payload', ARGV[2], 'token', token, 'before', before and string.match(before[1], '^%d+') or '0')
redis.call('HSET', KEYS[1], 'seq', seq)
local sent = redis.pcall('PUBLISH', ARGV[1], '\30' .. token .. '-' .. seq .. '\30\30' .. ARGV[2])
if type(sent) == 'table' then
    -- What was not published must not be kept. An empty stream would hide that events before it are gone.
    redis.call('XDEL', KEYS[3], seq .. '-0')
    if redis.call('XLEN', KEYS[3]) == 0 then
        redis.call('DEL', KEYS[3])
    end
    return redis.error_reply('DENIED this user may not PUBLISH to the channel: ' .. sent['err'])
end
redis.call('XTRIM', KEYS[3], 'MAXLEN', keep)
redis.call('XTRIM', KEYS[3], 'MINID', '~', string.format('%.0f', math.max(0, time - seconds * 1000000)))
redis.call('EXPIRE', KEYS[3], math.ceil(seconds))
if ARGV[3] ~= '' then
    -- An id that its publisher used twice is none to come back to; what begins with NUL marks it.
    if redis.call('ZADD', KEYS[4], seq, ARGV[3]) == 0 then
        redis.call('ZADD', KEYS[4], seq, '\0' .. ARGV[3])
    end
    redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -2 * keep - 1)
    redis.call('EXPIRE', KEYS[4], math.ceil(seconds))
end
return sent
