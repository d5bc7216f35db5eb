-- The only writer of a session: checks everything, then changes everything, then tells the peers.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision (the partition's counter), compacted
--       2 {p}:session:<id> HASH  one msgpack field per section; .revision, .turns (their number), .ops, .writers
--       3 {p}:turns:<id>   LIST  one msgpack value per turn
--       4 {p}:updated      ZSET  id by updated_at_ms
--       5 {p}:meta         HASH  id to packed metadata (below)
--       6 {p}:changes      ZSET  id by the revision of its last change; also the channel
--       7 {p}:deleted      ZSET  id by the revision of its deletion: the tombstones
--       8 {p}:deleted:ops  HASH  id to u64 time of deletion in ms, u32 length of .ops, .ops, .writers
--       . {p}:lease:<id>   HASH  (with a lease only) token and more: see lease.lua
--       . {p}:staging:<op> LIST  (mode "staged" only) the turns that are to replace the history
--
-- ARGV  1 operation id: 12 bytes, the writer's id (8) and its counter (4), which grows from one operation to the next
--       2 seen: a revision of this partition that the writer knew before it first sent this operation
--       3 incarnation of the namespace, from its descriptor
--       4 kind: "save", "append" or "delete"
--       5 session id
--       6 the revision that is to be overwritten; 0: the session must be absent; "": whatever is there. After a
--         colon may follow the operation id that made it: after a restore a revision may be given anew
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
-- .ops: the last operations, 20 bytes each: operation id, u64 revision; of more than 64 the older half is driven out.
-- .writers: u64 revision up to which operations may be forgotten; then for each of the writers that were last driven out
-- of .ops the operation with the highest counter that was, 20 bytes each. A writer's later ones were not driven out.
-- Message: msgpack array [revision u64, updated_at_ms u64, kind (0 saved, 1 deleted), origin bin 8, id].

local REMEMBERED = 64      -- operations per session, and
local WRITERS = 32         -- writers beyond them
local TOMBSTONES = 10000   -- per partition

local call, pcall, sub, find, byte = redis.call, redis.pcall, string.sub, string.find, string.byte
local op, kind, id = ARGV[1], ARGV[4], ARGV[5]
local deleting, clocked = kind == 'delete', kind ~= 'save'

local u32, u64, unsigned32, unsigned64
if struct then -- Redis and Valkey have it, fakeredis has not
  local pack, unpack = struct.pack, struct.unpack
  function u32(n) return pack('>I4', n) end
  function u64(n) return pack('>I8', n) end
  function unsigned32(bytes, at) return (unpack('>I4', bytes, at)) end
  function unsigned64(bytes, at) return (unpack('>I8', bytes, at)) end
else
  function u32(n)
    return string.char(math.floor(n / 16777216) % 256, math.floor(n / 65536) % 256, math.floor(n / 256) % 256, n % 256)
  end
  function u64(n) return u32(math.floor(n / 4294967296)) .. u32(n % 4294967296) end
  function unsigned32(bytes, at)
    local a, b, c, d = byte(bytes, at, at + 3)
    return ((a * 256 + b) * 256 + c) * 256 + d
  end
  function unsigned64(bytes, at) return unsigned32(bytes, at) * 4294967296 + unsigned32(bytes, at + 4) end
end

local function natural(text)
  local n = text and tonumber(text)
  return n and n >= 0 and n < 9007199254740992 and n % 1 == 0 and n
end

local function failed(reply) return type(reply) == 'table' and reply.err end

-- A foreign type is an answer of ours; any other error (missing rights, say) passes as it is.
local function refused(reply, code, part)
  if find(tostring(reply.err), 'WRONGTYPE', 1, true) then return {code, part} end
  return reply
end

-- Where `wanted` begins a record of 20 bytes, the first of which is at `first`.
local function record(records, wanted, first)
  local at = find(records, wanted, first, true)
  while at and (at - first) % 20 ~= 0 do at = find(records, wanted, at + 1, true) end
  return at
end

local state = pcall('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted')
if failed(state) then return refused(state, 'LAYOUT', 'state') end
if state[1] ~= ARGV[3] then return {'RESET', -1} end
local last, compacted, seen = natural(state[2]), natural(state[3]), tonumber(ARGV[2])
if not last or not compacted then return {'LAYOUT', 'state'} end
if last < seen then return {'RESET', last} end

local stored = pcall('HMGET', KEYS[2], '.revision', '.ops', 'version', '.turns', '.writers')
local foreign = failed(stored)
if foreign then
  local answer = refused(stored, 'CORRUPT', 'session')
  if not deleting or answer.err then return answer end
  stored = {}
end
local current, ops, writers, forgotten = natural(stored[1]), stored[2], stored[5], 0
local exists = current and true or false
if not exists and not foreign then
  if call('EXISTS', KEYS[2]) == 1 then
    if not deleting then return {'CORRUPT', '.revision'} end
    foreign = true
  else
    local tombstone = pcall('HGET', KEYS[8], id)
    if failed(tombstone) then return refused(tombstone, 'LAYOUT', 'deleted:ops') end
    if tombstone then
      local length = unsigned32(tombstone, 9)
      ops, writers = sub(tombstone, 13, 12 + length), sub(tombstone, 13 + length)
    else
      ops, forgotten = '', compacted
      local change = pcall('ZSCORE', KEYS[6], id)
      if failed(change) then return refused(change, 'LAYOUT', 'changes') end
      if change then -- no tombstone, and yet it was there: its hash was evicted, and its memory with it
        if kind == 'append' then return {'CORRUPT', 'session'} end
        foreign, forgotten = deleting, last
      end
    end
  end
end
if not ops or #ops % 20 ~= 0 or (exists and ops == '') or (writers and writers ~= '' and #writers % 20 ~= 8) then
  if not deleting then return {'CORRUPT', '.ops'} end
  ops, writers, forgotten = '', nil, last
end
current = current or 0

local at = record(ops, op, 1)
if at then return {'OK', unsigned64(ops, at + 12), 0} end
if writers and writers ~= '' then
  forgotten = unsigned64(writers, 1)
  at = record(writers, sub(op, 1, 8), 9)
  if at then
    local mine, highest = unsigned32(op, 9), unsigned32(writers, at + 8)
    if mine == highest then return {'OK', unsigned64(writers, at + 12), 0} end
    if mine < highest then return {'FORGOTTEN', last} end
  end
end
if forgotten > seen then return {'FORGOTTEN', last} end

local expected, maker = ARGV[6], nil
if #expected > 12 and sub(expected, -13, -13) == ':' then expected, maker = sub(expected, 1, -14), sub(expected, -12) end
if ARGV[7] ~= '' and call('HGET', KEYS[9], 'token') ~= ARGV[7] then return {'LEASELOST'} end
if expected ~= '' and tonumber(expected) ~= current then return {'CONFLICT', current} end
if maker and sub(ops, -20, -9) ~= maker then return {'CONFLICT', current} end
if not exists and not foreign and kind ~= 'save' then return {'NOTFOUND'} end

local revision = last + 1
-- As text and bytes once: Redis takes long over a number that a script passes.
local revision_text, revision64 = string.format('%d', revision), u64(revision)
ops = ops .. op .. revision64
local crowded = #ops > 20 * REMEMBERED
if crowded or forgotten > 0 and not writers then
  writers = writers and writers ~= '' and writers or u64(forgotten)
end
if crowded then -- half of them at once: it is cheaper than one each time
  local half = 20 * REMEMBERED / 2
  for i = 1, half, 20 do
    local driven = sub(ops, i, i + 19)
    at = record(writers, sub(driven, 1, 8), 9)
    if not at then
      writers = writers .. driven
      if #writers > 8 + 20 * WRITERS then writers = sub(writers, 21, 28) .. sub(writers, 29) end
    elseif unsigned32(driven, 9) > unsigned32(writers, at + 8) then
      writers = sub(writers, 1, at - 1) .. sub(writers, at + 20) .. driven
    end
  end
  ops = sub(ops, half + 1)
end

local updated
if clocked then
  local clock = call('TIME')
  updated = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
else
  updated = tonumber(ARGV[9])
end
local updated64

if deleting then
  for i, name in ipairs({'updated', 'meta', 'changes', 'deleted', 'deleted:ops'}) do
    local look = (i == 2 or i == 5) and {'HGET', KEYS[3 + i], id} or {'ZCARD', KEYS[3 + i]}
    local reply = pcall(unpack(look))
    if failed(reply) then return refused(reply, 'LAYOUT', name) end
  end
  updated64 = u64(updated)
  call('UNLINK', KEYS[2], KEYS[3])
  call('ZREM', KEYS[4], id)
  call('HDEL', KEYS[5], id)
  call('ZADD', KEYS[6], revision_text, id)
  call('ZADD', KEYS[7], revision_text, id)
  call('HSET', KEYS[8], id, updated64 .. u32(#ops) .. ops .. (writers or ''))
  if call('ZCARD', KEYS[7]) > TOMBSTONES then
    local oldest = call('ZRANGE', KEYS[7], 0, 0, 'WITHSCORES')
    call('ZREM', KEYS[7], oldest[1])
    call('ZREM', KEYS[6], oldest[1])
    call('HDEL', KEYS[8], oldest[1])
    call('HSET', KEYS[1], 'compacted', oldest[2])
  end
else
  if exists and stored[3] ~= ARGV[8] then return {'VERSION', stored[3] or ''} end
  local mode = ARGV[11]
  local meta = pcall('HGET', KEYS[5], id)
  if failed(meta) then return refused(meta, 'LAYOUT', 'meta') end
  local length = pcall('LLEN', KEYS[3])
  if failed(length) then return refused(length, 'CORRUPT', 'history.turns') end
  if mode == 'push' or mode == 'edit' then
    if not meta or #meta < 35 or sub(meta, 1, 2) ~= '\151\207' then return {'CORRUPT', 'meta'} end
    if natural(stored[4]) ~= length then return {'CORRUPT', 'history.turns'} end
  end
  if clocked then updated = math.max(updated, unsigned64(meta, 12)) end
  updated64 = u64(updated)
  local updated_text = string.format('%.0f', updated)

  local fields = {'.revision', revision_text, '.ops', ops, '.turns', ''}
  if crowded or (writers and not exists) then fields[7], fields[8] = '.writers', writers end
  if clocked then fields[#fields + 1], fields[#fields + 2] = 'updated_at_ms', '\207' .. updated64 end
  at = 13
  for _ = 1, ARGV[12] do
    fields[#fields + 1], fields[#fields + 2] = ARGV[at], ARGV[at + 1]
    at = at + 2
  end
  local removed = {}
  for i = 1, ARGV[at] do removed[i] = ARGV[at + i] end
  at = at + #removed + 1

  local staged, from = mode == 'staged' and tonumber(ARGV[at]), at
  if mode == 'edit' then
    from = at + 3 + 2 * ARGV[at + 2]
    length = ARGV[at + 1] - ARGV[at] + 1
  elseif mode == 'replace' then
    length = 0
  end
  if staged and call('LLEN', KEYS[#KEYS]) ~= staged then return {'STAGING'} end
  length = staged or length + #ARGV - from + 1
  fields[6] = string.format('%d', length)

  if not exists then
    local tombstones = pcall('ZCARD', KEYS[7])
    if failed(tombstones) then return refused(tombstones, 'LAYOUT', 'deleted') end
  end
  -- The first write is one that a full server refuses; that of a foreign index is undone.
  local index = pcall('ZADD', KEYS[4], updated_text, id)
  if failed(index) then return refused(index, 'LAYOUT', 'updated') end
  local change = pcall('ZADD', KEYS[6], revision_text, id)
  if failed(change) then
    if exists and meta then
      call('ZADD', KEYS[4], unsigned64(meta, 12), id)
    else
      call('ZREM', KEYS[4], id)
    end
    return refused(change, 'LAYOUT', 'changes')
  end

  call('HSET', KEYS[2], unpack(fields))
  for i = 1, #removed, 4000 do call('HDEL', KEYS[2], unpack(removed, i, math.min(i + 3999, #removed))) end
  if staged then
    call('RENAME', KEYS[#KEYS], KEYS[3])
    call('PERSIST', KEYS[3])
  else
    if mode == 'replace' then
      call('UNLINK', KEYS[3])
    elseif mode == 'edit' then
      call('LTRIM', KEYS[3], ARGV[at], ARGV[at + 1])
      for i = at + 3, from - 1, 2 do call('LSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
    end
    for i = from, #ARGV, 4000 do call('RPUSH', KEYS[3], unpack(ARGV, i, math.min(i + 3999, #ARGV))) end
  end
  call('HSET', KEYS[5], id, '\151\207' .. revision64 .. '\207' .. updated64 .. '\206' .. u32(length) .. '\196\8'
    .. sub(op, 1, 8) .. (clocked and sub(meta, 35) or ARGV[10]))
  if not exists then
    call('ZREM', KEYS[7], id)
    call('HDEL', KEYS[8], id)
  end
end
call('HSET', KEYS[1], 'revision', revision_text)
call('PUBLISH', KEYS[6], '\149\207' .. revision64 .. '\207' .. updated64 .. (deleting and '\1' or '\0') .. '\196\8'
  .. sub(op, 1, 8) .. '\217' .. string.char(#id) .. id)
return {'OK', revision, updated}
