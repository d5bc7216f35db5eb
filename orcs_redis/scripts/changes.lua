-- The sessions that changed after a revision, in order of their last change, each once.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision, compacted
--       2 {p}:changes      ZSET  id by the revision of its last change
--       3 {p}:meta         HASH  id to index metadata
--       4 {p}:deleted:meta HASH  id to u64 time of deletion, origin (8 bytes)
--
-- ARGV  1 incarnation of the namespace
--       2 the revision after which; "" asks for the present one alone
--       3 the number of sessions at most
--
-- Reply, an array:
--   "OK", revision, id, revision of its last change, kind (0 saved, 1 deleted), u64 time in ms, origin, id, ...
--       where the revision is the partition's, or that of the last change returned if there are more
--   "RESET", -1           another incarnation
--   "RESET", revision     the partition is not that far: the data went back
--   "COMPACTED", revision tombstones up to there were dropped: deletions since may be unknown

local state = redis.call('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted')
if state[1] ~= ARGV[1] then return {'RESET', -1} end
local revision, since, limit = tonumber(state[2]), tonumber(ARGV[2]), tonumber(ARGV[3])
local reply = {'OK', revision}
if ARGV[2] == '' or since == revision then return reply end
if since > revision then return {'RESET', revision} end
-- Who begins with nothing needs to know of no deletion.
if since > 0 and since < tonumber(state[3]) then return {'COMPACTED', tonumber(state[3])} end

local found = redis.call('ZRANGE', KEYS[2], '(' .. ARGV[2], '+inf', 'BYSCORE', 'LIMIT', 0, limit, 'WITHSCORES')
for i = 1, #found, 2 do
  local meta, kind, at = redis.call('HGET', KEYS[3], found[i]), 0, ''
  local origin = ''
  if meta then
    at, origin = string.sub(meta, 12, 19), string.sub(meta, 27, 34)
  else
    local tombstone = redis.call('HGET', KEYS[4], found[i]) or ''
    kind, at, origin = 1, string.sub(tombstone, 1, 8), string.sub(tombstone, 9, 16)
  end
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4], reply[n + 5] = found[i], found[i + 1], kind, at, origin
end
if #found == 2 * limit then reply[2] = tonumber(found[#found]) end
return reply
