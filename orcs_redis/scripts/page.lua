-- A run of sessions, newest first, from the index alone; equal times are ordered by id, descending bytes.
--
-- KEYS  1 {p}:updated  ZSET  id by updated_at_ms
--       2 {p}:meta     HASH  id to index metadata
--       3 {p}:labels   ZSET  label and id
--
-- ARGV  1 how many sessions to look at, at most
--       2 only those updated at or after this, in ms ("-inf": all)
--       3 only those updated before this, in ms ("+inf": all)
--       4 updated_at_ms and
--       5 id of the last session looked at before, which need not be there any more; "" and "": from the newest
--     then labels, of which a session must have all: how their members of {p}:labels begin, before the id
--
-- Reply: a flat array: updated_at_ms and id of the last session looked at ("" and "": there are no others after it),
-- then id, index metadata, id, ... ("" where that is missing).

local MAX_VALUES = 4000 -- in one command: Lua's stack is short

local function less(a, b) -- by bytes: Lua's own < follows the server's locale
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

-- The ids that have a label.
local function labelled(ids, label)
  local found = {}
  for from = 1, #ids, MAX_VALUES do
    local members = {}
    for i = from, math.min(from + MAX_VALUES - 1, #ids) do members[i - from + 1] = label .. ids[i] end
    for i, score in ipairs(redis.call('ZMSCORE', KEYS[3], unpack(members))) do
      if score then found[#found + 1] = ids[from + i - 1] end
    end
  end
  return found
end

local limit, position = tonumber(ARGV[1]), ARGV[4]
local first = ARGV[3] ~= '+inf' and redis.call('ZCOUNT', KEYS[1], ARGV[3], '+inf') or 0
if position ~= '' then
  -- The rank of the first session after the position, by halving the run of equal times.
  local low = redis.call('ZCOUNT', KEYS[1], '(' .. position, '+inf')
  local high = low + redis.call('ZCOUNT', KEYS[1], position, position)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if less(redis.call('ZRANGE', KEYS[1], middle, middle, 'REV')[1], ARGV[5]) then
      high = middle
    else
      low = middle + 1
    end
  end
  first = math.max(first, low)
end
local stop = first + limit - 1
if ARGV[2] ~= '-inf' then stop = math.min(stop, redis.call('ZCOUNT', KEYS[1], ARGV[2], '+inf') - 1) end
if stop < first then return {'', ''} end

local ids, reply = redis.call('ZRANGE', KEYS[1], first, stop, 'REV'), {'', ''}
if #ids == limit then reply = {redis.call('ZSCORE', KEYS[1], ids[#ids]), ids[#ids]} end
for i = 6, #ARGV do ids = labelled(ids, ARGV[i]) end
for from = 1, #ids, MAX_VALUES do
  local to = math.min(from + MAX_VALUES - 1, #ids)
  local metas = redis.call('HMGET', KEYS[2], unpack(ids, from, to))
  for i = from, to do
    reply[2 * i + 1], reply[2 * i + 2] = ids[i], metas[i - from + 1] or ''
  end
end
return reply
