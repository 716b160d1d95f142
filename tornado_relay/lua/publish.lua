-- Publishes an event, and keeps it where a relay has asked for that. Returns the token of its span, if it is kept.
--
-- KEYS: the history's state, its spans, the channel's events, the channel's own ids.
-- ARGV: channel, payload, id of the publisher's own or "", and the arguments of token_of() from is_new on.
--
-- A number is the time on the history's clock, or the one before it plus one.

local state = history(KEYS[1])
if not state.keep then
    return redis.call('PUBLISH', ARGV[1], ARGV[2])
end
if #ARGV[2] > 1048576 then
    return redis.error_reply('TOOLARGE the event is over 1 MiB')
end
local token = token_of(state, KEYS[2], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
-- Each event names the one before it on its channel, so that a reader sees what was deleted in between.
local entry = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
local before = entry and string.match(entry[1], '^%d+') or '0'
-- The channel's events can outlive the state, and then be further on than the clock.
local number = math.max(state.now, (state.last or 0) + 1, before + 1)
local seq = text(number)
redis.call('XADD', KEYS[3], seq .. '-0', 'payload', ARGV[2], 'token', token, 'before', before)
if number - state.time == state.stored then
    redis.call('HSET', KEYS[1], 'seq', seq)
else
    redis.call('HSET', KEYS[1], 'seq', seq, 'ahead', text(number - state.time))
end
local sent = redis.pcall('PUBLISH', ARGV[1], '\30' .. token .. '-' .. seq .. '\30\30' .. ARGV[2])
if type(sent) == 'table' then
    -- What was not published must not be kept. An empty stream would hide that events before it are gone.
    redis.call('XDEL', KEYS[3], seq .. '-0')
    if redis.call('XLEN', KEYS[3]) == 0 then
        redis.call('DEL', KEYS[3])
    end
    return redis.error_reply('DENIED this user may not PUBLISH to the channel: ' .. sent['err'])
end
redis.call('XTRIM', KEYS[3], 'MAXLEN', state.keep)
redis.call('XTRIM', KEYS[3], 'MINID', '~', text(math.max(0, number - state.seconds * 1000000)))
-- A clock that was ahead for a while, by less than what move_on() sees, must not let a key expire that read.lua takes for
-- kept: hence an eighth more.
local expiry = math.ceil(state.seconds * 1.125)
redis.call('EXPIRE', KEYS[3], expiry)
if ARGV[3] ~= '' then
    -- An id that its publisher used twice is none to come back to; what begins with NUL marks it.
    if redis.call('ZADD', KEYS[4], seq, ARGV[3]) == 0 then
        redis.call('ZADD', KEYS[4], seq, '\0' .. ARGV[3])
    end
    redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -2 * state.keep - 1)
    redis.call('EXPIRE', KEYS[4], expiry)
end
return token
