-- The sessions that changed after a revision, each once: of all, in order of their last change, or of those named.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision, compacted
--       2 {p}:changes      ZSET  id by the revision of its last change
--       3 {p}:meta         HASH  id to index metadata
--       4 {p}:deleted:meta HASH  id to u64 time of deletion, origin (8 bytes)
--
-- ARGV  1 incarnation of the namespace
--       2 the revision after which; "" asks for the present one alone
--       3 the number of sessions at most; where there are ids, how many of them have no entry, as is known
--       4 ... ids, 1,000 at most: only these, at first those that have no entry, as is known
--
-- Reply, an array:
--   "OK", revision, id, revision of its last change, kind (0 saved, 1 deleted), u64 time in ms, origin, id, ...
--       where the revision is the partition's, or that of the last change returned if there are more. An id that has
--       no entry, as was not known, comes with revision 0: there is no such session
--   "RESET", -1           another incarnation
--   "RESET", revision     the partition is not that far: the data went back
--   "COMPACTED", revision tombstones up to there were dropped: deletions since may be unknown

local state = redis.call('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted')
if state[1] ~= ARGV[1] then return {'RESET', -1} end
local revision, since, limit = tonumber(state[2]), tonumber(ARGV[2]), tonumber(ARGV[3])
local all, reply = #ARGV == 3, {'OK', revision}
if ARGV[2] == '' or all and since == revision then return reply end
if since > revision then return {'RESET', revision} end
-- Who begins with nothing needs to know of no deletion.
local compacted = since > 0 and since < tonumber(state[3]) and {'COMPACTED', tonumber(state[3])}

local function add(id, changed)
  local meta, kind, at, origin = redis.call('HGET', KEYS[3], id), 0, '', ''
  if meta then
    at, origin = string.sub(meta, 12, 19), string.sub(meta, 27, 34)
  else
    local tombstone = redis.call('HGET', KEYS[4], id) or ''
    kind, at, origin = 1, string.sub(tombstone, 1, 8), string.sub(tombstone, 9, 16)
  end
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4], reply[n + 5] = id, changed, kind, at, origin
end

if all then
  if compacted then return compacted end
  local found = redis.call('ZRANGE', KEYS[2], '(' .. ARGV[2], '+inf', 'BYSCORE', 'LIMIT', 0, limit, 'WITHSCORES')
  for i = 1, #found, 2 do add(found[i], found[i + 1]) end
  if #found == 2 * limit then reply[2] = tonumber(found[#found]) end
  return reply
end

local scores = redis.call('ZMSCORE', KEYS[2], unpack(ARGV, 4))
for i = 1, #ARGV - 3 do
  local changed = tonumber(scores[i] or 0)
  if changed > since then
    add(ARGV[3 + i], changed)
  elseif changed == 0 and i > limit then -- dropped, or never made
    if compacted then return compacted end
    add(ARGV[3 + i], 0)
  end
end
return reply
