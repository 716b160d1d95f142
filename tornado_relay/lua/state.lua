-- Comes before the other scripts: the state of the history, and its clock.

local function text(number)
    return string.format('%.0f', number)
end

-- Returns the state at `key`. Numbers are times in microseconds on the history's clock, which never goes back: `ahead` is
-- the lead that it has over the server's clock, since that was set back or another server took over. So the distance
-- between two numbers is never less than the time that passed between them, on whatever clock a key expired.
local function history(key)
    local fields = redis.call('HMGET', key, 'keep', 'seconds', 'since', 'token', 'seq', 'ahead', 'server', 'run')
    local now = redis.call('TIME')
    local state = {key = key, keep = fields[1], seconds = fields[2], since = fields[3], token = fields[4]}
    state.last, state.stored = tonumber(fields[5]), tonumber(fields[6]) or 0
    state.place, state.process = fields[7], fields[8]
    state.time = now[1] * 1000000 + now[2]
    state.ahead = math.max(state.stored, (state.last or 0) - state.time)
    state.now = state.time + state.ahead
    return state
end

-- Moves the end of the history on, even if nothing is published: events behind an old number may have expired.
local function move_on(state, seconds)
    if not state.last or state.now - state.last > seconds * 125000 or state.ahead ~= state.stored then
        -- Redis may refuse to write, for want of memory or after a failed save. What it keeps can be read all the same.
        local done = redis.pcall('HSET', state.key, 'seq', text(state.now), 'ahead', text(state.ahead))
        if type(done) == 'number' then
            state.last, state.stored = state.now, state.ahead
        end
    end
end
