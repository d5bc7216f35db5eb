-- The only writer of sessions: checks everything, then changes everything, then tells the peers. One call performs one
-- operation or several of a partition, in their order; each has its own outcome, and what they share is written once.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision (the partition's counter), compacted
--       2 {p}:updated      ZSET  id by updated_at_ms
--       3 {p}:meta         HASH  id to packed metadata (below)
--       4 {p}:changes      ZSET  id by the revision of its last change; also the channel
--       5 {p}:deleted      ZSET  id by the revision of its deletion: the tombstones
--       6 {p}:deleted:ops  HASH  id to u64 time of deletion in ms, u32 length of .ops, .ops, .writers
--     then for each operation
--       . {p}:session:<id> HASH  one msgpack field per section; .revision, .turns (their number), .ops, .writers
--       . {p}:turns:<id>   LIST  one msgpack value per turn
--       . {p}:lease:<id>   HASH  (with a lease only) token and more: see lease.lua
--       . {p}:staging:<op> LIST  (mode "staged" only) the turns that are to replace the history
--
-- ARGV  1 incarnation of the namespace, from its descriptor
--       2 version of the session schema, msgpack
--     then for each operation
--      +0 how many of the following arguments are this operation's
--      +1 20 bytes. Operation id: the writer's id (8) and its counter (4), which grows from one operation to the next;
--         seen: a revision (u64) of this partition that the writer knew before it first sent this operation
--      +2 kind: "save", "append" or "delete"
--      +3 session id
--      +4 the revision that is to be overwritten; 0: the session must be absent; "": whatever is there. After a
--         colon may follow the operation id that made it: after a restore a revision may be given anew
--      +5 fencing token of the lease under which to write; "": without
--       append: the turns. save:
--      +6 updated_at_ms, decimal (an append takes the server's now, but never goes backwards)
--      +7 tail of the packed metadata (an append leaves it as it is)
--      +8 mode of the history: "push" turns; "replace" it by turns; "staged": rename the staging key; "edit" it
--      +9 number of pairs of section and value, then the pairs
--       . number of sections to remove, then their names
--       . push, replace: the turns. staged: their number. edit: index of the first and last to keep, number of
--         pairs of index and turn, the pairs, then turns to push
--
-- Reply, an array with one item for each operation: an error of the server's, or an array
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
-- For every item but "OK" nothing was written.
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

local call, pcall, sub, find, byte, format = redis.call, redis.pcall, string.sub, string.find, string.byte, string.format

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

-- The operations, and what is the same for all.

local starts, ids, replies = {}, {}, {}
local after = 3
while after <= #ARGV do
  starts[#starts + 1], ids[#ids + 1] = after, ARGV[after + 3]
  after = after + 1 + ARGV[after]
end

local function everyone(reply)
  for n = 1, #starts do replies[n] = reply end
  return replies
end

local state = pcall('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted')
if failed(state) then return everyone(refused(state, 'LAYOUT', 'state')) end
if state[1] ~= ARGV[1] then return everyone({'RESET', -1}) end
local written, compacted = natural(state[2]), natural(state[3])
if not written or not compacted then return everyone({'LAYOUT', 'state'}) end
local last = written -- the revision of the last operation that is planned
local metas, known = pcall('HMGET', KEYS[3], unpack(ids)), {} -- packed metadata; by id what was written since

local now
local function clock()
  if not now then
    local time = call('TIME')
    now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  end
  return now
end

local function message(revision64, updated64, kind, op, id)
  return '\149\207' .. revision64 .. '\207' .. updated64 .. kind .. '\196\8' .. sub(op, 1, 8) .. '\217'
    .. string.char(#id) .. id
end

-- What is planned: sessions by id, and in order. Their keys are written by `execute`.
local planned, plans, messages = {}, {}, {}

local function execute()
  if #plans == 0 then return end
  local times, changes, packed = {}, {}, {}
  for n, s in ipairs(plans) do
    times[2 * n - 1], times[2 * n] = format('%.0f', s.updated), s.id
    changes[2 * n - 1], changes[2 * n] = s.fields[2], s.id
    packed[2 * n - 1] = s.id
    packed[2 * n] = '\151\207' .. s.revision64 .. '\207' .. s.updated64 .. '\206' .. u32(s.length) .. '\196\8'
      .. s.origin .. s.tail
  end
  -- The first write is one that a full server refuses; that of a foreign index is undone.
  local part, reply = 'updated', pcall('ZADD', KEYS[2], unpack(times))
  if not failed(reply) then
    part, reply = 'changes', pcall('ZADD', KEYS[4], unpack(changes))
    for n = 1, failed(reply) and #plans or 0 do
      if plans[n].was then call('ZADD', KEYS[2], plans[n].was, plans[n].id) else call('ZREM', KEYS[2], plans[n].id) end
    end
  end
  if failed(reply) then
    for _, s in ipairs(plans) do
      for _, n in ipairs(s.operations) do replies[n] = refused(reply, 'LAYOUT', part) end
    end
    last = written
  else
    for _, s in ipairs(plans) do
      call('HSET', s.key, unpack(s.fields))
      local removed, pushed = s.removed, s.pushed
      for i = 1, removed and #removed or 0, 4000 do
        call('HDEL', s.key, unpack(removed, i, math.min(i + 3999, #removed)))
      end
      if s.staging then
        call('RENAME', s.staging, s.turns)
        call('PERSIST', s.turns)
      elseif s.mode == 'replace' then
        call('UNLINK', s.turns)
      elseif s.mode == 'edit' then
        call('LTRIM', s.turns, s.first, s.last)
        for i = 1, #s.edits, 2 do call('LSET', s.turns, s.edits[i], s.edits[i + 1]) end
      end
      for i = 1, #pushed, 4000 do call('RPUSH', s.turns, unpack(pushed, i, math.min(i + 3999, #pushed))) end
      if s.created then
        call('ZREM', KEYS[5], s.id)
        call('HDEL', KEYS[6], s.id)
      end
    end
    call('HSET', KEYS[3], unpack(packed))
    call('HSET', KEYS[1], 'revision', format('%d', last))
    for _, text in ipairs(messages) do call('PUBLISH', KEYS[4], text) end
    written = last
    for n = 1, #packed, 2 do known[packed[n]] = packed[n + 1] end
  end
  planned, plans, messages = {}, {}, {}
end

-- The session as it is stored, and what it remembers; or nil and the answer.
local function read(id, kind, key)
  local deleting = kind == 'delete'
  local stored = pcall('HMGET', key, '.revision', '.ops', 'version', '.turns', '.writers')
  local foreign = failed(stored)
  if foreign then
    local answer = refused(stored, 'CORRUPT', 'session')
    if not deleting or answer.err then return nil, answer end
    stored = {}
  end
  local current, ops, writers, forgotten = natural(stored[1]), stored[2], stored[5], 0
  local exists = current and true or false
  if not exists and not foreign then
    if call('EXISTS', key) == 1 then
      if not deleting then return nil, {'CORRUPT', '.revision'} end
      foreign = true
    else
      local tombstone = pcall('HGET', KEYS[6], id)
      if failed(tombstone) then return nil, refused(tombstone, 'LAYOUT', 'deleted:ops') end
      if tombstone and #tombstone < 12 then return nil, {'LAYOUT', 'deleted:ops'} end
      if tombstone then
        local length = unsigned32(tombstone, 9)
        ops, writers = sub(tombstone, 13, 12 + length), sub(tombstone, 13 + length)
      else
        ops, forgotten = '', compacted
        local change = pcall('ZSCORE', KEYS[4], id)
        if failed(change) then return nil, refused(change, 'LAYOUT', 'changes') end
        if change then -- no tombstone, and yet it was there: its hash was evicted, and its memory with it
          if kind == 'append' then return nil, {'CORRUPT', 'session'} end
          foreign, forgotten = deleting, tonumber(change) -- all that it had were up to there
        end
      end
    end
  end
  if not ops or #ops % 20 ~= 0 or (exists and ops == '') or (writers and writers ~= '' and #writers % 20 ~= 8) then
    if not deleting then return nil, {'CORRUPT', '.ops'} end
    ops, writers, forgotten = '', nil, written
  end
  if writers == '' then writers = nil end
  if writers then forgotten = unsigned64(writers, 1) end
  -- All fields at once: a table that grows is dear.
  return {
    id = id, key = key, turns = false, staging = false, exists = exists, foreign = foreign, current = current or 0,
    version = stored[3], length = stored[4], ops = ops, writers = writers, forgotten = forgotten, operations = false,
    fields = false, pushed = false, removed = false, edits = false, mode = false, first = false, last = false,
    created = false, was = false, updated = false, updated64 = false, revision64 = false, tail = false, origin = false,
  }
end

-- The answer to an operation that was applied before, or may have been.
local function repeated(s, op, seen)
  local at = record(s.ops, op, 1)
  if at then return {'OK', unsigned64(s.ops, at + 12), 0} end
  at = s.writers and record(s.writers, sub(op, 1, 8), 9)
  if at then
    local mine, highest = unsigned32(op, 9), unsigned32(s.writers, at + 8)
    if mine == highest then return {'OK', unsigned64(s.writers, at + 12), 0} end
    if mine < highest then return {'FORGOTTEN', written} end
  end
  if s.forgotten > seen then return {'FORGOTTEN', written} end
  return nil
end

-- Remember an operation. Whether some were driven out: half of them at once, which is cheaper than one each time.
local function memorize(s, op, revision64)
  local ops, writers = s.ops .. op .. revision64, s.writers
  local crowded = #ops > 20 * REMEMBERED
  if not writers and (crowded or s.forgotten > 0) then writers = u64(s.forgotten) end
  if crowded then
    local half = 20 * REMEMBERED / 2
    for i = 1, half, 20 do
      local driven = sub(ops, i, i + 19)
      local at = record(writers, sub(driven, 1, 8), 9)
      if not at then
        writers = writers .. driven
        if #writers > 8 + 20 * WRITERS then writers = sub(writers, 21, 28) .. sub(writers, 29) end
      elseif unsigned32(driven, 9) > unsigned32(writers, at + 8) then
        writers = sub(writers, 1, at - 1) .. sub(writers, at + 20) .. driven
      end
    end
    ops = sub(ops, half + 1)
  end
  s.ops, s.writers = ops, writers
  if writers then s.forgotten = unsigned64(writers, 1) end
  return crowded
end

local function delete(s, op)
  for i, name in ipairs({'updated', 'meta', 'changes', 'deleted', 'deleted:ops'}) do
    local look = (i == 2 or i == 5) and {'HGET', KEYS[1 + i], s.id} or {'ZCARD', KEYS[1 + i]}
    local reply = pcall(unpack(look))
    if failed(reply) then return refused(reply, 'LAYOUT', name) end
  end
  last = last + 1
  local revision, revision64, updated = format('%d', last), u64(last), clock()
  local updated64 = u64(updated)
  memorize(s, op, revision64)
  call('UNLINK', s.key, s.turns)
  call('ZREM', KEYS[2], s.id)
  call('HDEL', KEYS[3], s.id)
  call('ZADD', KEYS[4], revision, s.id)
  call('ZADD', KEYS[5], revision, s.id)
  call('HSET', KEYS[6], s.id, updated64 .. u32(#s.ops) .. s.ops .. (s.writers or ''))
  if call('ZCARD', KEYS[5]) > TOMBSTONES then
    local oldest = call('ZRANGE', KEYS[5], 0, 0, 'WITHSCORES')
    call('ZREM', KEYS[5], oldest[1])
    call('ZREM', KEYS[4], oldest[1])
    call('HDEL', KEYS[6], oldest[1])
    call('HSET', KEYS[1], 'compacted', oldest[2])
    compacted = tonumber(oldest[2])
  end
  call('HSET', KEYS[1], 'revision', revision)
  call('PUBLISH', KEYS[4], message(revision64, updated64, '\1', op, s.id))
  written, known[s.id] = last, false
  return {'OK', last, updated}
end

-- Check what a save or an append needs of the keys, and plan it. `at` is where its own arguments begin, `stop` the last.
local function put(s, n, op, kind, at, stop, meta)
  local appending = kind == 'append'
  if s.exists and not s.fields and s.version ~= ARGV[2] then return {'VERSION', s.version or ''} end
  local mode, from = 'push', at
  if not appending then mode = ARGV[at + 2] end
  if not s.fields then
    if failed(metas) then return refused(metas, 'LAYOUT', 'meta') end
    local length = pcall('LLEN', s.turns)
    if failed(length) then return refused(length, 'CORRUPT', 'history.turns') end
    if mode == 'push' or mode == 'edit' then
      if not meta or #meta < 35 or sub(meta, 1, 2) ~= '\151\207' then return {'CORRUPT', 'meta'} end
      if natural(s.length) ~= length then return {'CORRUPT', 'history.turns'} end
    end
    if not s.exists then
      local tombstones = pcall('ZCARD', KEYS[5])
      if failed(tombstones) then return refused(tombstones, 'LAYOUT', 'deleted') end
    end
    if meta and #meta >= 35 then s.updated, s.tail = unsigned64(meta, 12), sub(meta, 35) end
    s.length = length
  end

  local pairs_from, removed_from
  if not appending then
    pairs_from = at + 4
    removed_from = pairs_from + 2 * ARGV[at + 3] + 1
    from = removed_from + ARGV[removed_from - 1]
    if mode == 'staged' then
      local staged = tonumber(ARGV[from])
      if call('LLEN', s.staging) ~= staged then return {'STAGING'} end
      s.length, from = staged, stop + 1
    elseif mode == 'edit' then
      s.first, s.last = ARGV[from], ARGV[from + 1]
      s.length = s.last - s.first + 1
    elseif mode == 'replace' then
      s.length = 0
    end
  end

  last = last + 1
  local revision64 = u64(last)
  local told = memorize(s, op, revision64)
  if not s.fields then
    s.was = s.exists and s.updated
    s.created, s.mode, s.pushed, s.operations = not s.exists, mode, {}, {}
    s.fields = {'.revision', '', '.ops', '', '.turns', ''}
    told = told or s.created and s.writers
    planned[s.id], plans[#plans + 1] = s, s
  end
  local fields, pushed = s.fields, s.pushed
  if appending then
    s.updated = math.max(clock(), s.updated)
  else
    s.updated, s.tail = tonumber(ARGV[at]), ARGV[at + 1]
    for i = pairs_from, removed_from - 2 do fields[#fields + 1] = ARGV[i] end
    s.removed = {}
    for i = removed_from, removed_from + ARGV[removed_from - 1] - 1 do s.removed[#s.removed + 1] = ARGV[i] end
    if mode == 'edit' then
      s.edits = {}
      for i = from + 3, from + 2 + 2 * ARGV[from + 2] do s.edits[#s.edits + 1] = ARGV[i] end
      from = from + 3 + #s.edits
    end
  end
  for i = from, stop do pushed[#pushed + 1] = ARGV[i] end
  s.length = s.length + stop - from + 1

  s.updated64, s.revision64, s.origin = u64(s.updated), revision64, sub(op, 1, 8)
  -- As text once: Redis takes long over a number that a script passes.
  fields[2], fields[4], fields[6] = format('%d', last), s.ops, format('%d', s.length)
  if told then fields[#fields + 1], fields[#fields + 2] = '.writers', s.writers end
  if appending then fields[#fields + 1], fields[#fields + 2] = 'updated_at_ms', '\207' .. s.updated64 end
  s.exists, s.current = true, last
  s.operations[#s.operations + 1] = n
  messages[#messages + 1] = message(revision64, s.updated64, '\0', op, s.id)
  return {'OK', last, s.updated}
end

local key = 7
for n, start in ipairs(starts) do
  local op, seen, kind, id = sub(ARGV[start + 1], 1, 12), unsigned64(ARGV[start + 1], 13), ARGV[start + 2], ids[n]
  local expected, maker, token = ARGV[start + 4], nil, ARGV[start + 5]
  local session, turns, lease, staging = KEYS[key], KEYS[key + 1], nil, nil
  key = key + 2
  if token ~= '' then lease, key = KEYS[key], key + 1 end
  if kind == 'save' and ARGV[start + 8] == 'staged' then staging, key = KEYS[key], key + 1 end
  if #expected > 12 and sub(expected, -13, -13) == ':' then
    expected, maker = sub(expected, 1, -14), sub(expected, -12)
  end

  -- Appends to one session are written as one. Whatever else meets what is planned waits until that is written, and a
  -- deletion is not to share the fate of what a full server refuses.
  local s, answer = planned[id], nil
  if kind == 'delete' or s and (kind ~= 'append' or expected ~= '' or repeated(s, op, seen)) then
    execute()
    s = nil
  end
  if written < seen then
    answer = {'RESET', written}
  elseif not s then
    s, answer = read(id, kind, session)
  end
  answer = answer or repeated(s, op, seen)
  if not answer then
    if token ~= '' and call('HGET', lease, 'token') ~= token then
      answer = {'LEASELOST'}
    elseif expected ~= '' and tonumber(expected) ~= s.current or maker and sub(s.ops, -20, -9) ~= maker then
      answer = {'CONFLICT', s.current}
    elseif not s.exists and not s.foreign and kind ~= 'save' then
      answer = {'NOTFOUND'}
    else
      s.turns, s.staging = turns, staging or s.staging
      if kind == 'delete' then
        answer = delete(s, op)
      else
        local meta = known[id]
        if meta == nil then meta = metas[n] end
        answer = put(s, n, op, kind, start + 6, start + ARGV[start], meta)
      end
    end
  end
  replies[n] = answer
end
execute()
return replies
