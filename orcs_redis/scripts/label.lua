-- Of a run of the sessions that have a label, in the order of their ids, the newest; equal times are ordered by id,
-- descending bytes.
--
-- KEYS  1 {p}:labels   ZSET  label and id
--       2 {p}:updated  ZSET  id by updated_at_ms
--       3 {p}:meta     HASH  id to index metadata
--
-- ARGV  1 how many sessions to look at: at most 4,000
--       2 how many of them to return at most
--       3 only those updated at or after this, in ms ("-inf": all)
--       4 only those updated before this, in ms ("+inf": all)
--       5 updated_at_ms and
--       6 id of a session: only those that come after it in the order of lists ("" and "": all)
--       7 id of the last session looked at before, which need not be there any more; "": from the first
--       8 the label: how its members of KEYS[1] begin, before the id
--     then other labels, all of which a session must have too
--
-- Reply: a flat array: id of the last session looked at ("": there are no others after it), the number of sessions
-- found, then updated_at_ms, id, index metadata, updated_at_ms, ... of the newest of them, in no order ("" where
-- metadata is missing).

local function less(a, b) -- by bytes: Lua's own < follows the server's locale
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

local function bound(text)
  if text == '-inf' then return -math.huge end
  return text == '+inf' and math.huge or tonumber(text)
end

local count, limit, label = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[8]
local after, before, position, position_id = bound(ARGV[3]), bound(ARGV[4]), tonumber(ARGV[5]), ARGV[6]

local low = ARGV[7] == '' and '[' .. label or '(' .. label .. ARGV[7]
-- No id begins with the byte 255.
local members = redis.call('ZRANGE', KEYS[1], low, '(' .. label .. '\255', 'BYLEX', 'LIMIT', 0, count)
if #members == 0 then return {'', 0} end

local ids, found, times = {}, {}, {}
for i, member in ipairs(members) do ids[i] = string.sub(member, #label + 1) end
for i, score in ipairs(redis.call('ZMSCORE', KEYS[2], unpack(ids))) do
  local time, id = score and tonumber(score), ids[i]
  if time and time >= after and time < before
    and (not position or time < position or time == position and less(id, position_id)) then
    found[#found + 1], times[id] = id, time
  end
end
for i = 9, #ARGV do
  if #found == 0 then break end
  local others, both = {}, {}
  for n, id in ipairs(found) do others[n] = ARGV[i] .. id end
  for n, score in ipairs(redis.call('ZMSCORE', KEYS[1], unpack(others))) do
    if score then both[#both + 1] = found[n] end
  end
  found = both
end

local number = #found
if limit > 0 and limit < number then
  local newest, kept = {}, {}
  for n, id in ipairs(found) do newest[n] = times[id] end
  table.sort(newest) -- numbers alone: several times as fast as with a function
  for _, id in ipairs(found) do
    if times[id] >= newest[number - limit + 1] then kept[#kept + 1] = id end
  end
  if #kept > limit then
    table.sort(kept, function(a, b) return times[a] > times[b] or times[a] == times[b] and less(b, a) end)
  end
  found = kept
end

local reply = {#members == count and ids[#ids] or '', number}
limit = math.min(limit, #found)
if limit == 0 then return reply end
for i, meta in ipairs(redis.call('HMGET', KEYS[3], unpack(found, 1, limit))) do
  reply[3 * i], reply[3 * i + 1], reply[3 * i + 2] = times[found[i]], found[i], meta or ''
end
return reply
