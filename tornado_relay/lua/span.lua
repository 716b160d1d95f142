-- Comes before the scripts that draw numbers: the span that the next number belongs to.

-- Returns the token of the span, which begins now if the server is not known to have all events up to the last number.
--
-- is_new: "1" if the script was not in the server's cache. place: which server of a group this is, or "" without a group.
-- process: the server's run_id, which the client has asked for at its connect, or "" if it may not. seen: the tokens that
-- the client has got from whatever server it was connected to, the newest first.
--
-- A process that started after the last number was drawn has read the data from its own disk: the new span begins right
-- behind the last event that it has, and the spans before it stay. Any other process takes over from one that was there
-- beside it, and cannot know the events that the other one took and did not hand on. Neither can a server that does not
-- know the client's newest token: another server had the say meanwhile. Then no place of before is one to go on from, and
-- the spans are forgotten.
local function token_of(state, spans, is_new, place, process, seen)
    local took_over = place ~= '' and state.place ~= place
    local restarted = process ~= '' and state.process and state.process ~= process
    if restarted then
        -- The server itself knows best, and also since when it runs. Asking it takes too long to do so for each event.
        local info = redis.pcall('INFO', 'server')
        if type(info) == 'string' then
            process = string.match(info, 'run_id:(%w+)') or process
            restarted = state.process ~= process
            local uptime = tonumber(string.match(info, 'uptime_in_seconds:(%d+)')) or 0
            local drawn = math.floor((state.last - state.stored) / 1000000)
            took_over = took_over or restarted and drawn > math.floor(state.time / 1000000) - uptime
        end
    elseif is_new == '1' and (process == '' or not state.process) then
        -- Of a server that does not say which one it is, only the missing script tells that it started again.
        restarted = true
    end
    local newest = seen
    if seen ~= '' and seen ~= state.token then
        newest = string.match(seen, '^%x+')
    end
    if newest == state.token then
        seen = ''
    end
    if seen ~= '' or took_over or restarted or not state.token then
        local known = {}
        for _, each in ipairs(redis.call('LRANGE', spans, 0, -1)) do
            known[each] = true
        end
        -- The tokens of forgotten spans and of other servers: each of these is news once only.
        local left = redis.call('HGET', state.key, 'left') or ''
        took_over = took_over or seen ~= '' and not known[newest] and not string.find(left, newest, 1, true)
        if took_over or restarted or not state.token then
            for each in string.gmatch(seen, '%x+') do
                if not known[each] and not string.find(left, each, 1, true) then
                    left = left .. ',' .. each
                end
            end
            if took_over then
                for each in pairs(known) do
                    left = #each == 8 and left .. ',' .. each or left
                end
                redis.call('DEL', spans)
            end
            local first = state.last and state.last + 1 or state.now
            state.token = string.sub(redis.sha1hex(text(state.now) .. (state.token or '') .. process .. seen), 1, 8)
            redis.call('RPUSH', spans, state.token, text(first))
            redis.call('LTRIM', spans, -2000, -1)
            redis.call('HSET', state.key, 'token', state.token, 'left', string.sub(left, -1800))
            if took_over and process == '' then
                -- Otherwise the next client that knows the process would take the same change for another one.
                redis.call('HDEL', state.key, 'run')
            end
        end
    end
    if place ~= '' and state.place ~= place then
        redis.call('HSET', state.key, 'server', place)
    end
    if process ~= '' and state.process ~= process then
        redis.call('HSET', state.key, 'run', process)
    end
    return state.token
end
