-- Asks for a history to be kept, or goes on with the one that is, and returns where it ends and its spans.
--
-- KEYS: the history's state, its spans. ARGV: events to keep of a channel, seconds, and the arguments of token_of() from
-- is_new on.

local state = history(KEYS[1])
local token = token_of(state, KEYS[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
move_on(state, ARGV[2])
-- What came before was kept for a shorter time, or not at all.
if not state.seconds or tonumber(state.seconds) < tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[1], 'since', text(state.last))
end
if state.keep ~= ARGV[1] or state.seconds ~= ARGV[2] then
    redis.call('HSET', KEYS[1], 'keep', ARGV[1], 'seconds', ARGV[2])
end
return {token, text(state.last), redis.call('LRANGE', KEYS[2], 0, -1)}
