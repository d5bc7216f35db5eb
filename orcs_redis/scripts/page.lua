-- A run of sessions, newest first, from the index alone; equal times are ordered by id, descending bytes.
--
-- KEYS  1 {p}:updated  ZSET  id by updated_at_ms
--       2 {p}:meta     HASH  id to index metadata
--
-- ARGV  1 limit: the number of sessions at most
--       2 only those updated at or after this, in ms ("-inf": all)
--       3 only those updated before this, in ms ("+inf": all)
--       4 updated_at_ms and
--       5 id of the last session already had, which need not be there any more; "" and "": from the newest
--
-- Reply: a flat array: updated_at_ms of the last session, then id, index metadata, id, ... ("" where that is missing).

local function less(a, b) -- by bytes: Lua's own < follows the server's locale
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
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
if stop < first then return {''} end

local ids, reply = redis.call('ZRANGE', KEYS[1], first, stop, 'REV'), {''}
for from = 1, #ids, 4000 do
  local to = math.min(from + 3999, #ids)
  local metas = redis.call('HMGET', KEYS[2], unpack(ids, from, to))
  for i = from, to do
    reply[2 * i], reply[2 * i + 1] = ids[i], metas[i - from + 1] or ''
  end
end
if #ids > 0 then reply[1] = redis.call('ZSCORE', KEYS[1], ids[#ids]) end
return reply
