-- Returns token and number of the history's end, and for each channel a page: up to where it has all, or nothing if
-- there are no more; up to where events have gone; and number, token and payload of each event.
--
-- KEYS: the history's state, then the channels' events. ARGV: events of a page, bytes of a page, bytes of all pages,
-- then the numbers to read behind. Bytes are without the last event; all pages share theirs in the order of numbers.

local state = history(KEYS[1])
if not state.token then
    return {}
end
move_on(state, state.seconds)
local function kept_from(moment)
    return math.max(tonumber(state.since), moment - state.seconds * 1000000)
end
local pages, all = {}, {}
for n = 2, #KEYS do
    local limit, room, after = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[n + 2]
    local page, gone, more, from, count = {'', '0', {}}, 0, false, '(' .. after, 1
    local rows = page[3]
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
            all[#all + 1] = {tonumber(seq), #payload, page, #rows}
            limit, room, from = limit - 1, room - #payload, '(' .. entry[1]
            if limit <= 0 or room <= 0 then
                more = true
                page[1] = seq
                break
            end
        end
        count = #rows > 0 and math.min(limit, 100, math.ceil(room / (#rows[#rows][3] + 1)))
    until more or #found == 0
    if #rows == 0 and redis.call('EXISTS', KEYS[n]) == 0 then
        gone = kept_from(state.now)
    end
    -- Behind the history's end nothing has been.
    page[2] = text(math.min(gone, state.last))
    pages[#pages + 1] = page
end
local room = tonumber(ARGV[3])
table.sort(all, function(a, b) return a[1] < b[1] end)
for _, each in ipairs(all) do
    local seq, size, page, number = unpack(each)
    if room <= 0 and #page[3] >= number then
        page[1] = text(seq - 1)
        for extra = #page[3], number, -1 do
            page[3][extra] = nil
        end
    end
    room = room - size
end
return {state.token, text(state.last), pages}
