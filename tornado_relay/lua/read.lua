-- Returns token and number of the history's end, up to where events without a stream may have gone, and for each
-- channel a page: whether there is more, up to where events have gone, and number, token and payload of each event.
--
-- KEYS: the history's state, then the channels' events. ARGV: events of a page, bytes of a page, then the numbers to
-- read behind.

local token, last, since, seconds = unpack(redis.call('HMGET', KEYS[1], 'token', 'seq', 'since', 'seconds'))
if not token then
    return {}
end
local now = redis.call('TIME')
local time = now[1] * 1000000 + now[2]
-- Numbers are times, and what is behind an old one may have gone. So the end moves on, even if nothing is published.
if time - last > seconds * 125000 then
    last = string.format('%.0f', time)
    redis.call('HSET', KEYS[1], 'seq', last)
end
local function kept_from(moment)
    return math.max(tonumber(since), moment - seconds * 1000000)
end
local pages = {}
for n = 2, #KEYS do
    local limit, room, after = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[n + 1]
    local rows, gone, more, from, count = {}, 0, false, '(' .. after, 1
    repeat
        -- Events may have 1 MiB each: first one, then about as many of its size as there is room for.
        local found = redis.call('XRANGE', KEYS[n], from, '+', 'COUNT', count)
        for _, entry in ipairs(found) do
            local seq, payload, tag, before = string.match(entry[1], '^%d+'), entry[2][2], entry[2][4], entry[2][6]
            if #rows == 0 then
                -- The first of a channel's events, as far as Redis knows: there may have been some long before.
                gone = before == '0' and kept_from(tonumber(seq)) or tonumber(before)
            end
            rows[#rows + 1] = {seq, tag, payload}
            limit, room, from = limit - 1, room - #payload, '(' .. entry[1]
            if limit <= 0 or room <= 0 then
                more = true
                break
            end
        end
        count = #rows > 0 and math.min(limit, 100, math.ceil(room / (#rows[#rows][3] + 1)))
    until more or #found == 0
    if #rows == 0 and redis.call('EXISTS', KEYS[n]) == 0 then
        gone = kept_from(time)
    end
    -- Behind the history's end nothing has been.
    pages[#pages + 1] = {more and 1 or 0, string.format('%.0f', math.min(gone, tonumber(last))), rows}
end
return {token, last, pages}
