-- The only writer of a session: checks everything, then changes everything, then tells the peers.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision (the partition's counter), compacted
--       2 {p}:session:<id> HASH  one msgpack field per section; .revision, .turns (their number), .ops
--       3 {p}:turns:<id>   LIST  one msgpack value per turn
--       4 {p}:updated      ZSET  id by updated_at_ms
--       5 {p}:meta         HASH  id to packed metadata (below)
--       6 {p}:changes      ZSET  id by the revision of its last change; also the channel
--       7 {p}:deleted      ZSET  id by the revision of its deletion: the tombstones
--       8 {p}:deleted:ops  HASH  id to u64 time of deletion in ms, then the ops the session had
--       . {p}:lease:<id>   HASH  (with a lease only) token and more: see lease.lua
--       . {p}:staging:<op> LIST  (mode "staged" only) the turns that are to replace the history
--
-- ARGV  1 operation id: 12 bytes, the writer's id (8) and its counter (4)
--       2 seen: a revision of this partition that the writer knew before it first sent this operation
--       3 incarnation of the namespace, from its descriptor
--       4 kind: "save", "append" or "delete"
--       5 session id
--       6 the revision that is to be overwritten; 0: the session must be absent; "": whatever is there
--       7 fencing token of the lease under which to write; "": without
--   save and append only:
--       8 version of the session schema, msgpack
--       9 updated_at_ms, decimal; "" (append): the server's now, but never backwards
--      10 tail of the packed metadata; "" (append): as it is
--      11 mode of the history: "push" turns; "replace" it by turns; "staged": rename the last key; "edit" it
--      12 number of pairs of section and value, then the pairs
--       . number of sections to remove, then their names
--       . push, replace: the turns. staged: their number. edit: index of the first and last to keep, number of
--         pairs of index and turn, the pairs, then turns to push
--
-- Reply, an array:
--   "OK", revision, updated_at_ms    applied now, or by an earlier sending of this operation id (updated_at_ms: 0 then)
--   "CONFLICT", revision             the session is at another revision (0: absent)
--   "LEASELOST"                      the lease ended or passed to another
--   "NOTFOUND"                       append, delete: no such session
--   "CORRUPT", part                  what is stored can't be what this script wrote
--   "VERSION", msgpack               the stored session has another schema version
--   "STAGING"                        the staged turns are not all there: their own commands failed
--   "FORGOTTEN", revision            operations after `seen` were forgotten, and this one may have been among them
--   "RESET", revision                another incarnation (revision -1), or revisions went back
--   "LAYOUT", part                   a partition's key has a foreign type
-- In every case but "OK" nothing was written.
--
-- Packed metadata: msgpack array [revision u64, updated_at_ms u64, turns u32, origin bin 8, created_at_ms, name,
-- root_path], of which the first four have fixed widths (34 bytes with the array's head) and the rest is the tail. The
-- origin is the id of the last writer, the first 8 bytes of its operation ids.
-- .ops: u64 revision of the last operation forgotten, then 20 bytes for each one remembered: operation id, u64 revision.
-- Message: msgpack array [revision u64, updated_at_ms u64, kind (0 saved, 1 deleted), origin bin 8, id].

local REMEMBERED = 32      -- operations per session
local TOMBSTONES = 10000   -- per partition

local op, kind, id = ARGV[1], ARGV[4], ARGV[5]
local deleting, clocked = kind == 'delete', kind ~= 'save'

local function u64(n)
  local hi, lo = math.floor(n / 4294967296), n % 4294967296
  return string.char(math.floor(hi / 16777216), math.floor(hi / 65536) % 256, math.floor(hi / 256) % 256, hi % 256,
    math.floor(lo / 16777216), math.floor(lo / 65536) % 256, math.floor(lo / 256) % 256, lo % 256)
end

local function unsigned(bytes, first, last)
  local n = 0
  for i = first, last do n = n * 256 + string.byte(bytes, i) end
  return n
end

local function natural(text)
  return text and #text < 17 and string.find(text, '^%d+$') and tonumber(text)
end

local function failed(reply) return type(reply) == 'table' and reply.err end

-- A foreign type is an answer of ours; any other error (missing rights, say) passes as it is.
local function refused(reply, code, part)
  if string.find(tostring(reply.err), 'WRONGTYPE', 1, true) then return {code, part} end
  return reply
end

local state = redis.pcall('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted')
if failed(state) then return refused(state, 'LAYOUT', 'state') end
if state[1] ~= ARGV[3] then return {'RESET', -1} end
local last, seen = natural(state[2]), tonumber(ARGV[2])
if not last or not natural(state[3]) then return {'LAYOUT', 'state'} end
if last < seen then return {'RESET', last} end

local stored = redis.pcall('HMGET', KEYS[2], '.revision', '.ops', 'version', '.turns')
local foreign = failed(stored)
if foreign then
  local answer = refused(stored, 'CORRUPT', 'session')
  if not deleting or answer.err then return answer end
  stored = {}
end
local current, ops, forgotten = natural(stored[1]), stored[2], 0
local exists = current and true or false
if not exists and not foreign then
  if redis.call('EXISTS', KEYS[2]) == 1 then
    if not deleting then return {'CORRUPT', '.revision'} end
    foreign = true
  else
    local tombstone = redis.pcall('HGET', KEYS[8], id)
    if failed(tombstone) then return refused(tombstone, 'LAYOUT', 'deleted:ops') end
    if tombstone then ops = string.sub(tombstone, 9) else forgotten = tonumber(state[3]) end
  end
end
if (exists or foreign) and not (ops and #ops % 20 == 8) then
  if not deleting then return {'CORRUPT', '.ops'} end
  ops = nil
end
current = current or 0

if ops then
  local at = string.find(ops, op, 9, true)
  while at do
    if at % 20 == 9 then return {'OK', unsigned(ops, at + 12, at + 19), 0} end
    at = string.find(ops, op, at + 1, true)
  end
  forgotten = unsigned(ops, 1, 8)
else
  ops = u64(forgotten)
end
if forgotten > seen then return {'FORGOTTEN', last} end

if ARGV[7] ~= '' and redis.call('HGET', KEYS[9], 'token') ~= ARGV[7] then return {'LEASELOST'} end
if ARGV[6] ~= '' and tonumber(ARGV[6]) ~= current then return {'CONFLICT', current} end
if not exists and not foreign and kind ~= 'save' then return {'NOTFOUND'} end

local revision = last + 1
ops = ops .. op .. u64(revision)
if #ops > 8 + 20 * REMEMBERED then ops = string.sub(ops, 21) end -- the first one's revision becomes the head

local clock = clocked and redis.call('TIME')
local updated = clock and tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000) or tonumber(ARGV[9])

if deleting then
  for i, name in ipairs({'updated', 'meta', 'changes', 'deleted', 'deleted:ops'}) do
    local look = (i == 2 or i == 5) and {'HGET', KEYS[3 + i], id} or {'ZCARD', KEYS[3 + i]}
    local reply = redis.pcall(unpack(look))
    if failed(reply) then return refused(reply, 'LAYOUT', name) end
  end
  redis.call('UNLINK', KEYS[2], KEYS[3])
  redis.call('ZREM', KEYS[4], id)
  redis.call('HDEL', KEYS[5], id)
  redis.call('ZADD', KEYS[6], revision, id)
  redis.call('ZADD', KEYS[7], revision, id)
  redis.call('HSET', KEYS[8], id, u64(updated) .. ops)
  if redis.call('ZCARD', KEYS[7]) > TOMBSTONES then
    local oldest = redis.call('ZRANGE', KEYS[7], 0, 0, 'WITHSCORES')
    redis.call('ZREM', KEYS[7], oldest[1])
    redis.call('ZREM', KEYS[6], oldest[1])
    redis.call('HDEL', KEYS[8], oldest[1])
    redis.call('HSET', KEYS[1], 'compacted', oldest[2])
  end
else
  if exists and stored[3] ~= ARGV[8] then return {'VERSION', stored[3] or ''} end
  local mode, at = ARGV[11], 13
  local meta = redis.pcall('HGET', KEYS[5], id)
  if failed(meta) then return refused(meta, 'LAYOUT', 'meta') end
  local length = redis.pcall('LLEN', KEYS[3])
  if failed(length) then return refused(length, 'CORRUPT', 'history.turns') end
  if mode == 'push' or mode == 'edit' then
    if not meta or #meta < 35 or string.sub(meta, 1, 2) ~= '\151\207' then return {'CORRUPT', 'meta'} end
    if natural(stored[4]) ~= length then return {'CORRUPT', 'history.turns'} end
  end
  if clocked then updated = math.max(updated, unsigned(meta, 12, 19)) end

  local fields = {'.revision', revision, '.ops', ops, '.turns', length}
  if clocked then fields[7], fields[8] = 'updated_at_ms', '\207' .. u64(updated) end
  for _ = 1, ARGV[12] do
    fields[#fields + 1], fields[#fields + 2] = ARGV[at], ARGV[at + 1]
    at = at + 2
  end
  local removed = {}
  for i = 1, ARGV[at] do removed[i] = ARGV[at + i] end
  at = at + #removed + 1

  local staged, edits, from = mode == 'staged' and tonumber(ARGV[at]), 0, at
  if mode == 'edit' then
    edits = tonumber(ARGV[at + 2])
    from = at + 3 + 2 * edits
    length = ARGV[at + 1] - ARGV[at] + 1
  elseif mode == 'replace' then
    length = 0
  end
  if staged and redis.call('LLEN', KEYS[#KEYS]) ~= staged then return {'STAGING'} end
  length = staged or length + #ARGV - from + 1
  fields[6] = length

  if not exists then
    local tombstones = redis.pcall('ZCARD', KEYS[7])
    if failed(tombstones) then return refused(tombstones, 'LAYOUT', 'deleted') end
  end
  -- The first write is one that a full server refuses; that of a foreign index is undone.
  local index = redis.pcall('ZADD', KEYS[4], updated, id)
  if failed(index) then return refused(index, 'LAYOUT', 'updated') end
  local change = redis.pcall('ZADD', KEYS[6], revision, id)
  if failed(change) then
    if exists and meta then
      redis.call('ZADD', KEYS[4], unsigned(meta, 12, 19), id)
    else
      redis.call('ZREM', KEYS[4], id)
    end
    return refused(change, 'LAYOUT', 'changes')
  end

  redis.call('HSET', KEYS[2], unpack(fields))
  for i = 1, #removed, 4000 do redis.call('HDEL', KEYS[2], unpack(removed, i, math.min(i + 3999, #removed))) end
  if staged then
    redis.call('RENAME', KEYS[#KEYS], KEYS[3])
    redis.call('PERSIST', KEYS[3])
  else
    if mode == 'replace' then
      redis.call('UNLINK', KEYS[3])
    elseif mode == 'edit' then
      redis.call('LTRIM', KEYS[3], ARGV[at], ARGV[at + 1])
      for i = at + 3, from - 1, 2 do redis.call('LSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
    end
    for i = from, #ARGV, 4000 do redis.call('RPUSH', KEYS[3], unpack(ARGV, i, math.min(i + 3999, #ARGV))) end
  end
  redis.call('HSET', KEYS[5], id, '\151\207' .. u64(revision) .. '\207' .. u64(updated) .. '\206'
    .. string.sub(u64(length), 5) .. '\196\8' .. string.sub(op, 1, 8) .. (clocked and string.sub(meta, 35) or ARGV[10]))
  if not exists then
    redis.call('ZREM', KEYS[7], id)
    redis.call('HDEL', KEYS[8], id)
  end
end
redis.call('HSET', KEYS[1], 'revision', revision)
redis.call('PUBLISH', KEYS[6], '\149\207' .. u64(revision) .. '\207' .. u64(updated) .. (deleting and '\1' or '\0')
  .. '\196\8' .. string.sub(op, 1, 8) .. '\217' .. string.char(#id) .. id)
return {'OK', revision, updated}
