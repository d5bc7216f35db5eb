-- The only script that writes sessions: checks everything, then changes it, then publishes. One call performs one
-- operation or several of a partition, in their order; each has its own outcome, and what they share is written once.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision (the partition's counter), compacted, forgotten, dedup_bytes,
--                                dedup windows (below)
--       2 {p}:updated      ZSET  id by updated_at_ms
--       3 {p}:meta         HASH  id to index metadata (below)
--       4 {p}:changes      ZSET  id by the revision of its last change
--       5 {p}:deleted      ZSET  id by the revision of its deletion: the tombstones
--       6 {p}:deleted:meta HASH  id to u64 time of deletion in ms, origin (8 bytes)
--       7 {p}:labels       ZSET  (scores 0) u8 length of a label's name, name, u32 length of its value, value, id; with
--                                an empty name the project's path
--     then for each operation
--       . {p}:session:<id> HASH  one msgpack field per part; .revision, .op, .turns (their number), .born, .reshaped,
--                                .parts: revisions of the write that made the session, of the last one that changed
--                                turns other than by pushing, of the last one that changed any other part but
--                                updated_at_ms
--       . {p}:turns:<id>   LIST  one msgpack value per turn
--       . {p}:lease:<id>   HASH  (group l) token and more: see lease.lua
--       . {p}:staging:<name> LIST (group S) the turns that are to replace the history; (group T) those that z removes
--       . {p}:records:<id> HASH, {p}:names:<id> ZSET (groups P, N, D, R; kinds d, f) records by key; keys (scores 0)
--       . (kind f) the same four of the source: session, turns, records, names
--
-- ARGV  1 incarnation of the namespace, from its descriptor
--       2 version of the session schema, msgpack
--     then for each operation, of which there are 1,000 at most
--       . its header, bytes:
--          1 u32: how many of the following arguments are this operation's
--          5 u8: how many keys are
--          6 operation id, 20 bytes: the writer (origin, 8, and epoch, 4), then which of its operations it is (counter,
--            u32, one more than the last one's, and nonce, 4)
--         26 high-water mark, u64: a revision of this partition that the store knew before the first attempt
--         34 low-water mark, u32: the lowest counter of the epoch's operations that are not finished
--         38 kind: "w" write, "d" delete, "f" fork
--         39 its groups of arguments, in their order: a letter, and u32 how many arguments it has
--       conditions
--       r 1: the revision that is to be overwritten (kind f: of the source); 0: the session must be absent. After a
--            colon may follow the operation id that made it: a restore can reuse a revision
--       l 1: fencing token of the lease under which to write
--       b 1: what is barred, 12 bytes each: epoch (of the same origin), counter and nonce of an operation that was
--            given up without an answer; counter 0xffffffff: an epoch all of whose operations are finished
--       g 2: what the write was made from: a revision and its operation as in r, and the number of turns. Others may
--            have written since, but not what this write changes
--       e  : with g: for each part of s and then u, the first 16 digits of the SHA-1 of its value in that revision, ""
--            if it was absent
--       i 1: id of the last turn, msgpack
--       existence and time
--       W 0: the session becomes what is named here, whatever it was, and may be absent
--       c  : if the session is absent it is made: name and root_path (msgpack, one argument), then pairs of part, value
--       t 1: updated_at_ms, decimal. Else it moves to the server's time with changes of turns, and with n
--       n 0: as if turns were changed
--       k 0: with W: updated_at_ms is not lowered
--       parts
--       s  : pairs of part and value to set
--       u  : parts to remove
--       m 2: what the index metadata takes over from parts: created_at_ms, u64; name and root_path, msgpack. "": as is
--       L 1: all labels, a msgpack map
--       j  : pairs of label and value to set, "" to remove it
--       turns
--       x 2: index of the first and last turn to keep, -1 being the end
--       z 1: how many of the last turns to remove
--       q 1: how many of the first turns to keep (kind f: as well)
--       T 1: for how many ms what z removes stays in the staging key, for who has called to read it; with z alone
--       y  : pairs of index, among those that are kept, and turn to put there
--       v 3: an index, the id (msgpack) that the turn there must have, the turn to put there
--       h  : the turns that replace all
--       S 1: how many turns of the staging key replace all
--       p  : turns to push
--       records
--       P  : pairs of key and value to put
--       N  : pairs of key and value to put if there is no such key
--       D  : keys to drop
--       R  : prefixes of keys to drop, but for those of P and N
--       O 0: kind f: the records, too
--
-- Reply, an array with one item for each operation: a server error, or an array
--   "OK", revision, updated_at_ms, bits, before
--                                    applied now, or by an earlier attempt of this operation (updated_at_ms: 0 then).
--                                    bits: 7 bytes each of 56 bits, the highest first: whether the session was made;
--                                    whether each key of N was put. "": it was not, there was none.
--                                    before: the session's revision before, 0 if it was absent; not of an earlier
--                                    attempt. What only pushes is answered without bits and before
--   "CONFLICT", revision             the session is at another revision (0: absent), or another session by now; as of
--                                    "CORRUPT" and "VERSION", "source" may follow: that of a fork is meant; or "last":
--                                    the last turn is another than that of i
--   "CHANGED", revision, what        what the write was made from was changed by others: "turns", which stay so, or
--                                    "parts", which may come back
--   "LEASELOST"                      the lease ended or passed to another
--   "NOTFOUND"                       no such session; for a fork "", "source" follow
--   "CORRUPT", part                  what is stored can't be what this script wrote
--   "VERSION", msgpack               the stored session has another schema version
--   "STAGING"                        the staged turns are not all there: their own commands failed
--   "EMPTY", part                    a turn, part or record of no bytes
--   "LABELS"                         there would be more than 8
--   "FORGOTTEN", revision            barred, or below the low-water mark; or it may have been in an evicted window
--   "DENIED", command                the user may not call it
--   "MISSING", command               the server has no such command, or it was renamed
--   "RESET", revision                another incarnation (revision -1), or revisions went back
--   "LAYOUT", part                   a partition's key has a foreign type
-- For every item but "OK" nothing was written. An error in place of the array that was raised while the script ran
-- does not say what was written.
--
-- Index metadata: msgpack array [revision u64, updated_at_ms u64, turns u32, origin bin 8, written_at_ms u64,
-- created_at_ms u64, labels, name, root_path], of which the first six have fixed widths (52 bytes with the array's
-- first byte), and the rest is the tail. The origin is the store that wrote last. updated_at_ms is at most the server's
-- now, written_at_ms is the server's time of the last write.
-- .op: the id of the operation that made the revision.
-- Dedup window, a field of the state: "w" and the writer. It holds u32 low-water mark, u32 the highest counter so far,
-- u64 `forgotten_at_birth`, the partition's `forgotten` when it was made; then entries of 16 bytes in the order of
-- writing, one for each of the writer's operations that were applied: u32 counter, nonce, u64 revision; before it, if
-- its answer has bits, one for every 7 bytes of them: the same counter and nonce, 0x40, the bits. And one for
-- each that was barred: instead of its own, the partition's revision then, with the first byte 0x80. Entries at the
-- front that are below the low-water mark are trimmed, but for the last. What is neither in the window nor below that
-- mark was not applied, unless it may have been in an earlier window: then its high-water mark is below
-- `forgotten_at_birth`. A window that is evicted leaves its last revision in `forgotten`.
-- Message, on the channels {p}:changes:<incarnation> and {p}:changes:<incarnation>:<id>: msgpack array [revision u64,
-- updated_at_ms u64, kind (0 saved, 1 deleted), origin bin 8, id].

local MAX_DEDUP_BYTES = 4194304 -- of all windows of a partition; the same
local MAX_VALUES = 4000         -- in one command: Lua's stack is short
local ENTRY = 16                -- bytes of an entry in a dedup window
local BARRED_BYTE = 128         -- first byte of the revision in the entry of what is barred
local ANSWER_BYTE = 64          -- the same of an entry of answer bits

-- What most calls don't need, appends above all, is defined by `define_rest` when it is first asked for: to define it
-- takes longer than an append.
local define_rest, defined_rest
local function rest()
  defined_rest = defined_rest or define_rest()
  return defined_rest
end

local struct_pack, struct_unpack
if struct then
  struct_pack, struct_unpack = struct.pack, struct.unpack
else -- fakeredis has none: as much of it as is used here
  function struct_pack(layout, ...)
    local packed, i = '', 0
    for width in layout:gmatch('%d') do
      i = i + 1
      local n, bytes = select(i, ...), ''
      for _ = 1, tonumber(width) do
        bytes, n = string.char(n % 256) .. bytes, math.floor(n / 256)
      end
      packed = packed .. bytes
    end
    return packed
  end
  function struct_unpack(layout, packed, at)
    local values = {}
    at = at or 1
    for kind, width in layout:gmatch('(%a)(%d*)') do
      local value, stop = 0, at + (tonumber(width) or 1)
      for i = at, stop - 1 do value = value * 256 + packed:byte(i) end
      values[#values + 1] = kind == 'c' and packed:sub(at, stop - 1) or value
      at = stop
    end
    values[#values + 1] = at
    return unpack(values)
  end
end

local function whole_number(text)
  local n = text and tonumber(text)
  return n and n >= 0 and n < 9007199254740992 and n % 1 == 0 and n
end

-- A refusal is an item of the reply that says why an operation was not done. What returns one returns nil or false
-- where there is nothing to refuse.

-- The refusal if a reply is an error: for a foreign type that with the code, else the error as it is.
local function error_refusal(reply, code, part)
  if type(reply) ~= 'table' or not reply.err then return nil end
  if code and tostring(reply.err):find('WRONGTYPE', 1, true) then return {code, part} end
  return reply
end

-- The refusal if a command can't be called. acl_check_cmd gets arguments, as Valkey crashes without.
local rights = {}
local function not_callable(command)
  local refusal = rights[command]
  if refusal == nil then
    refusal = false
    if redis.acl_check_cmd then -- fakeredis has no rights to check
      local known, allowed
      if command == 'RENAME' or command == 'COPY' or command == 'LMOVE' then
        known, allowed = pcall(redis.acl_check_cmd, command, KEYS[1], KEYS[1])
      elseif command == 'UNLINK' then
        known, allowed = pcall(redis.acl_check_cmd, command, KEYS[1])
      else
        known, allowed = pcall(redis.acl_check_cmd, command, KEYS[1], '0', '0')
      end
      refusal = not known and {'MISSING', command} or not allowed and {'DENIED', command}
    end
    rights[command] = refusal
  end
  return refusal
end

-- What is asked for: the operations, and the dedup windows of their writers.

local state_key, updated_key, meta_key, changes_key, deleted_key, deleted_meta_key, labels_key =
  unpack(KEYS, 1, 7)
local operations, ids = {}, {}
local windows = {} -- in the order of their first operations, and by writer
local fields = {'incarnation', 'revision', 'compacted', 'forgotten'} -- of the state; the windows' follow

local function new_window(writer)
  local window = {
    name = 'w' .. writer, exists = false,
    low_water_mark = 0, highest = 0, forgotten_at_birth = nil, entries = '', -- as stored
    added = {}, -- entries that are not yet stored
    size = 0, -- bytes of it in dedup_bytes
  }
  windows[writer], windows[#windows + 1] = window, window
  return window
end

local function load_window(window, packed) -- false: it is none
  if #packed < 2 * ENTRY or #packed % ENTRY ~= 0 then return false end
  local entries_at
  window.low_water_mark, window.highest, window.forgotten_at_birth, entries_at = struct_unpack('>I4I4I8', packed)
  window.exists, window.size, window.entries = true, #packed, packed:sub(entries_at)
  return true
end

-- Where each group of arguments begins and ends; whether nothing but turns is pushed, on whatever conditions.
local function parse_groups(operation, header, at, argument, key)
  local first, last, records, others = {}, {}, nil, operation.kind ~= 'w'
  for group = at, #header, 5 do
    local letter, count = struct_unpack('>c1I4', header, group)
    first[letter], last[letter] = argument, argument + count - 1
    argument = argument + count
    others = others or letter ~= 'p' and not ('rlb'):find(letter, 1, true)
    if letter == 'l' then operation.lease_key, key = KEYS[key], key + 1
    elseif letter == 'S' or letter == 'T' then operation.staging_key, key = KEYS[key], key + 1
    elseif ('PNDR'):find(letter, 1, true) then records = true end
  end
  operation.first, operation.last = first, last
  operation.only_pushes = not others and first.p and last.p - first.p < MAX_VALUES
  if records or operation.kind ~= 'w' then operation.records_key, operation.names_key = KEYS[key], KEYS[key + 1] end
  if operation.kind == 'f' then operation.source = {unpack(KEYS, key + 2, key + 5)} end
end

local n, key, argument, id_at = 0, 8, 3, #meta_key + 5 -- where the id begins in {p}:session:<id>
while ARGV[argument] do
  local header = ARGV[argument]
  local argument_count, key_count, writer, identity, high_water_mark, low_water_mark, kind, groups_at =
    struct_unpack('>I4Bc12c8I8I4c1', header)
  local window = windows[writer]
  if not window then
    window = new_window(writer)
    fields[#fields + 1] = window.name
  end
  local operation = { -- parse_groups adds to it
    kind = kind, id = KEYS[key]:sub(id_at), session_key = KEYS[key], turns_key = KEYS[key + 1],
    op = writer .. identity, identity = identity, counter = struct_unpack('>I4', identity), window = window,
    high_water_mark = high_water_mark, low_water_mark = low_water_mark,
  }
  parse_groups(operation, header, groups_at, argument + 1, key + 2)
  n, key, argument = n + 1, key + key_count, argument + argument_count + 1
  operations[n], ids[n] = operation, operation.id
end
if n > 1000 then return redis.error_reply('ERR too many operations in one call') end

-- What is stored of the partition, and the time.

local items = {} -- the reply

local state = redis.pcall('HMGET', state_key, unpack(fields))
local state_refusal = error_refusal(state, 'LAYOUT', 'state') or state[1] ~= ARGV[1] and {'RESET', -1}
local partition = {
  revision = whole_number(state[2]), compacted = whole_number(state[3]), forgotten = whole_number(state[4]),
}
local sound = partition.revision and partition.compacted and partition.forgotten
for i, window in ipairs(windows) do
  local packed = state[4 + i]
  if packed and not load_window(window, packed) then sound = false end
end
if not state_refusal and not sound then state_refusal = {'LAYOUT', 'state'} end
if state_refusal then
  for i = 1, n do items[i] = state_refusal end
  return items
end
local metas = redis.pcall('HMGET', meta_key, unpack(ids))
local written_metas = {} -- by id, of this call; false: deleted

-- A time in the forms that are needed, from decimal ms.
local function time_of(text)
  local ms = tonumber(text)
  return {text = text, ms = ms, u64 = struct_pack('>I8', ms)}
end

local now
local clock = redis.pcall('TIME')
local clock_refusal = error_refusal(clock) and (not_callable('TIME') or clock)
if not clock_refusal then now = time_of(clock[1] .. string.format('%03d', math.floor(clock[2] / 1000))) end

-- Why no save or append can be done.
local write_refusal = error_refusal(metas, 'LAYOUT', 'meta') or not_callable('HSET') or clock_refusal

-- Dedup windows: which operations were applied.

-- The revision in an operation's entry, 8 bytes, and where the entry begins; nil if it has none.
local function find_entry(window, identity)
  local entries = window.entries .. table.concat(window.added)
  local at = entries:find(identity, 1, true)
  while at and at % ENTRY ~= 1 do at = entries:find(identity, at + 1, true) end
  return at and entries:sub(at + #identity, at + ENTRY - 1), at
end

-- The item of an operation that was applied before, or may have been; false for one that was not.
local function earlier_answer(operation)
  local window, forgotten = operation.window, partition.forgotten
  if window.exists then
    if operation.counter < window.low_water_mark then
      return {'FORGOTTEN', partition.revision} -- it arrives late: its store has finished with it
    end
    if operation.counter <= window.highest then
      local revision64, at = find_entry(window, operation.identity)
      if revision64 and revision64:byte() == BARRED_BYTE then return {'FORGOTTEN', partition.revision} end
      if revision64 then return rest().remembered(window, revision64, at) end
    end
    forgotten = window.forgotten_at_birth or forgotten
  end
  return forgotten > operation.high_water_mark and {'FORGOTTEN', partition.revision}
end

-- Entries at the front that are below the low-water mark are trimmed, but for the last.
local function pack_window(window)
  local entries, first = window.entries .. table.concat(window.added), 1
  while first + ENTRY < #entries and struct_unpack('>I4', entries, first) < window.low_water_mark do
    first = first + ENTRY
  end
  window.entries, window.added = entries:sub(first), {}
  window.forgotten_at_birth = window.forgotten_at_birth or partition.forgotten
  return struct_pack('>I4I4I8', window.low_water_mark, window.highest, window.forgotten_at_birth) .. window.entries
end

-- What the operations since the last `flush` write together.
local indexed = false -- whether the indexes have the first of the call: see add_to_indexes
local updated, changes, packed_metas, messages = {}, {}, {}, {}
local labelled = {} -- members of the index of labels: whether each is to be there

local function flush()
  if #messages == 0 then return end
  if #updated > 0 then redis.call('ZADD', updated_key, unpack(updated)) end
  if #changes > 0 then redis.call('ZADD', changes_key, unpack(changes)) end
  if #packed_metas > 0 then redis.call('HSET', meta_key, unpack(packed_metas)) end
  if next(labelled) then rest().flush_labels() end
  local values, growth = {'revision', string.format('%d', partition.revision)}, 0
  for _, window in ipairs(windows) do
    if #window.added > 0 then
      local packed = pack_window(window)
      growth, window.size = growth + #packed - window.size, #packed
      values[#values + 1], values[#values + 2] = window.name, packed
    end
  end
  local new, bytes = redis.call('HSET', state_key, unpack(values)), nil
  if growth ~= 0 or new > 0 then bytes = redis.pcall('HINCRBY', state_key, 'dedup_bytes', growth) end
  if bytes and not error_refusal(bytes) and (new > 0 or bytes > MAX_DEDUP_BYTES) then
    rest().evict_windows(bytes, new)
  end
  local channel = changes_key .. ':' .. ARGV[1]
  for i = 1, #messages, 2 do
    redis.pcall('PUBLISH', channel, messages[i])
    redis.pcall('PUBLISH', channel .. ':' .. messages[i + 1], messages[i])
  end
  updated, changes, packed_metas, messages = {}, {}, {}, {}
end

-- Notes that an operation was applied, for `flush` and for the operations that follow. Returns its item.
--   before: the session's revision before, 0: it was absent; nil: not to be told
--   turns: their number, nil: the session was deleted
--   about: the index metadata from created_at_ms on
--   bits: of the answer, nil: none
local function applied(operation, before, time, turns, about, bits)
  local ARRAY_5, ARRAY_9, U32, U64, BIN_8, STR = '\149', '\153', '\206', '\207', '\196\8', '\217' -- msgpack
  local id, window, revision64 = operation.id, operation.window, struct_pack('>I8', partition.revision)
  local origin, message_kind, added = operation.op:sub(1, 8), '\1', window.added
  local answer = bits and rest().pack_bits(bits) or ''
  for at = 1, #answer, 7 do
    added[#added + 1] = operation.identity .. string.char(ANSWER_BYTE) .. answer:sub(at, at + 6)
  end
  window.exists, added[#added + 1] = true, operation.identity .. revision64
  if operation.counter > window.highest then window.highest = operation.counter end
  if operation.low_water_mark > window.low_water_mark then window.low_water_mark = operation.low_water_mark end
  if operation.first.b then rest().bar(origin, ARGV[operation.first.b]) end

  local revision_and_time = U64 .. revision64 .. U64 .. time.u64
  if turns then
    local meta = ARRAY_9 .. revision_and_time .. U32 .. struct_pack('>I4', turns) .. BIN_8 .. origin
      .. U64 .. now.u64 .. U64 .. about
    local n = #packed_metas
    packed_metas[n + 1], packed_metas[n + 2] = id, meta
    written_metas[id], message_kind = meta, '\0'
  else
    written_metas[id] = false
  end
  local n = #messages
  messages[n + 1] = ARRAY_5 .. revision_and_time .. message_kind .. BIN_8 .. origin .. STR .. string.char(#id) .. id
  messages[n + 2] = id
  return {'OK', partition.revision, time.ms, before and answer, before}
end

-- The refusal if the session can't be read; or nil, then what is stored: revision (nil: absent), version, turns, op.
-- `foreign`: what is left is no session (a foreign type, no revision, an evicted hash); only a delete goes on.
local function read_session(operation)
  local deletes, session_key = operation.kind == 'd', operation.session_key
  local stored = redis.pcall('HMGET', session_key, '.revision', 'version', '.turns', '.op')
  local refusal = error_refusal(stored, 'CORRUPT', 'session')
  local foreign = refusal ~= nil
  if foreign then
    if not deletes or refusal.err then return refusal end
    stored = {}
  end
  local revision = whole_number(stored[1])
  if not revision and not foreign then
    local exists = redis.pcall('EXISTS', session_key)
    refusal = error_refusal(exists)
    if refusal then return refusal end
    if exists == 1 then
      if not deletes then return {'CORRUPT', '.revision'} end
      foreign = true
    else
      local tombstone = redis.pcall('HGET', deleted_meta_key, operation.id)
      local change = not tombstone and redis.pcall('ZSCORE', changes_key, operation.id)
      refusal = error_refusal(tombstone, 'LAYOUT', 'deleted:meta') or error_refusal(change, 'LAYOUT', 'changes')
      if refusal then return refusal end
      if change then -- no tombstone, and yet it was there: its hash was evicted by maxmemory
        if not deletes and not operation.first.W then return {'CORRUPT', 'session'} end
        foreign = deletes
      end
    end
  end
  if foreign then operation.foreign = true end
  return nil, revision, stored[2], tonumber(stored[3]), stored[4]
end

-- Index metadata.

local UPDATED_AT, CREATED_AT, TAIL = 12, 45, 53 -- where they begin

-- When the session was updated before, in ms; nil if `meta` is missing or malformed.
local function time_before(meta)
  if not meta or #meta < TAIL + 2 or meta:byte() ~= 153 then return nil end -- an array of 9
  return (struct_unpack('>I8', meta, UPDATED_AT))
end

-- The first operation of a call goes into both indexes at once: a full server, or an index of a foreign type, shows
-- before anything else is written; if the second refuses, the first is as before. The others follow in `flush`.
local function add_to_indexes(id, time, revision, updated_before)
  if indexed then
    local n = #changes
    changes[n + 1], changes[n + 2] = revision, id
    if time.ms ~= updated_before then
      n = #updated
      updated[n + 1], updated[n + 2] = time.text, id
    end
    return
  end
  local refusal = error_refusal(redis.pcall('ZADD', updated_key, time.text, id), 'LAYOUT', 'updated')
  if not refusal then
    refusal = error_refusal(redis.pcall('ZADD', changes_key, revision, id), 'LAYOUT', 'changes')
    if refusal and updated_before then
      redis.call('ZADD', updated_key, string.format('%.0f', updated_before), id)
    elseif refusal then
      redis.call('ZREM', updated_key, id)
    end
  end
  indexed = not refusal
  return refusal and (not_callable('ZADD') or refusal)
end

-- Pushes turns to a session that is there, and does nothing else: as `write`, but by far the most frequent.
local function push(operation, stored_turns, stored_meta)
  if write_refusal then return write_refusal end
  local first, last, id, time, meta = operation.first.p, operation.last.p, operation.id, now, nil
  meta = written_metas[id]
  if meta == nil then meta = stored_meta end
  local updated_before = time_before(meta)
  if not updated_before then return {'CORRUPT', 'meta'} end
  for i = first, last do
    if ARGV[i] == '' then return {'EMPTY', 'turn'} end
  end
  local pushed = last - first + 1
  local turns = redis.pcall('RPUSH', operation.turns_key, unpack(ARGV, first, last))
  local refusal = error_refusal(turns, 'CORRUPT', 'history.turns')
  if refusal then return not_callable('RPUSH') or refusal end
  if turns ~= stored_turns + pushed then return rest().undo_push(operation, pushed, {'CORRUPT', 'history.turns'}) end
  if updated_before > now.ms then time = time_of(string.format('%.0f', updated_before)) end
  local revision = string.format('%d', partition.revision + 1)
  refusal = add_to_indexes(id, time, revision, updated_before)
  if refusal then return rest().undo_push(operation, pushed, refusal) end
  partition.revision = partition.revision + 1
  redis.call('HSET', operation.session_key, '.revision', revision, '.op', operation.op,
    '.turns', string.format('%d', turns), 'updated_at_ms', '\207' .. time.u64)
  return applied(operation, nil, time, turns, meta:sub(CREATED_AT))
end

-- The refusal if a condition of the operation is not met.
local function check_conditions(operation, revision, turns, op)
  local first = operation.first
  local refusal = first.b and not_callable('HGET') -- which `bar` calls, when it is too late to refuse
  if refusal then return refusal end
  if first.l then
    local held = redis.pcall('HGET', operation.lease_key, 'token')
    refusal = error_refusal(held, 'LAYOUT', 'lease') or held ~= ARGV[first.l] and {'LEASELOST'}
    if refusal then return refusal end
  end
  if operation.kind == 'f' then return revision and {'CONFLICT', revision} end
  if first.r then
    local expected, expected_op = ARGV[first.r]:match('^(%d*):?(.*)$')
    if tonumber(expected) ~= (revision or 0) or expected_op ~= '' and op ~= expected_op then
      return {'CONFLICT', revision or 0}
    end
  end
  if first.g then
    refusal = rest().check_base(operation, revision, turns, op)
    if refusal then return refusal end
  end
  if not revision and not operation.foreign and not (first.W or first.c) then return {'NOTFOUND'} end
  if first.i then
    local turn = redis.pcall('LINDEX', operation.turns_key, -1)
    refusal = error_refusal(turn, 'CORRUPT', 'history.turns')
    if refusal then return refusal end
    if not turn or rest().id_of(turn) ~= ARGV[first.i] then return {'CONFLICT', revision or 0, 'last'} end
  end
end

function define_rest()
  local MAX_WINDOWS = 10000       -- per partition; beyond them one is evicted that was not used for long
  local MAX_TOMBSTONES = 10000    -- per partition
  local CLOSED = 4294967295       -- low-water mark of an epoch of which nothing is to come
  local MAX_LABELS = 8            -- of a session
  local MAX_COMPARED = 64         -- turns that others pushed, looked at for those of a write

  -- msgpack, as far as it is needed here; integers and strings in their shortest form.

  local function pack_integer(n)
    if n < 128 then return string.char(n) end
    if n < 256 then return '\204' .. string.char(n) end
    if n < 65536 then return '\205' .. struct_pack('>I2', n) end
    if n < 4294967296 then return '\206' .. struct_pack('>I4', n) end
    return '\207' .. struct_pack('>I8', n)
  end

  local function parse_integer(packed) -- nil: it is none, or negative
    local byte, widths = packed:byte(), {[204] = '>I1', [205] = '>I2', [206] = '>I4', [207] = '>I8'}
    if not byte or byte < 128 then return byte end
    return widths[byte] and #packed == 1 + 2 ^ (byte - 204) and (struct_unpack(widths[byte], packed, 2)) or nil
  end

  local function pack_text(text)
    return (#text < 32 and string.char(160 + #text) or '\217' .. string.char(#text)) .. text
  end

  -- Where the text that begins at `at` ends, and where it begins itself; nil if there is no text. Of nil (192): places
  -- of which the second is behind the first.
  local function text_bounds(packed, at)
    local byte = packed:byte(at)
    if not byte then return nil end
    local size
    if byte == 192 then return at, at + 1
    elseif byte >= 160 and byte < 192 then size, at = byte - 160, at + 1
    elseif byte == 217 and #packed > at then size, at = packed:byte(at + 1), at + 2
    elseif byte == 218 and #packed > at + 1 then size, at = struct_unpack('>I2', packed, at + 1), at + 3
    elseif byte == 219 and #packed > at + 3 then size, at = struct_unpack('>I4', packed, at + 1), at + 5
    else return nil end
    if at + size - 1 > #packed then return nil end
    return at + size - 1, at
  end

  -- A turn's id as it is packed: it follows the array's first byte. nil if this is no turn.
  local function id_of(turn)
    local last = text_bounds(turn, 2)
    return last and turn:sub(2, last)
  end

  -- A map of texts: name to value, and where it ends. nil if it is none.
  local function parse_labels(packed, at)
    local count, labels, last, first = packed:byte(at) or 0, {}, at, nil
    if count < 128 or count > 143 then return nil end
    for _ = 1, count - 128 do
      last, first = text_bounds(packed, last + 1)
      if not last then return nil end
      local name = packed:sub(first, last)
      last, first = text_bounds(packed, last + 1)
      if not last then return nil end
      labels[name] = packed:sub(first, last)
    end
    return labels, last
  end

  local function less(a, b) -- by bytes: Lua's own < follows the server's locale
    for i = 1, math.min(#a, #b) do
      local x, y = a:byte(i), b:byte(i)
      if x ~= y then return x < y end
    end
    return #a < #b
  end

  local function pack_labels(labels) -- nil if there are too many
    local names, packed = {}, {}
    for name in pairs(labels) do names[#names + 1] = name end
    if #names > MAX_LABELS then return nil end
    table.sort(names, less)
    for i, name in ipairs(names) do packed[i] = pack_text(name) .. pack_text(labels[name]) end
    return string.char(128 + #names) .. table.concat(packed)
  end

  -- Commands with many arguments.

  local function call_with(command, key, values)
    for i = 1, #values, MAX_VALUES do
      redis.call(command, key, unpack(values, i, math.min(i + MAX_VALUES - 1, #values)))
    end
  end

  -- Calls a command with arguments of this script. Returns the last reply, nil if there are no arguments.
  local function call_in_batches(command, key, first, last)
    local reply
    for i = first, last, MAX_VALUES do
      reply = redis.call(command, key, unpack(ARGV, i, math.min(i + MAX_VALUES - 1, last)))
    end
    return reply
  end

  -- Dedup windows.

  -- The item of an operation whose entry, or the first of whose answer bits, is there.
  local function remembered(window, revision64, at)
    local entries, bits = window.entries .. table.concat(window.added), ''
    while revision64:byte() == ANSWER_BYTE do
      bits, at = bits .. revision64:sub(2), at + ENTRY
      revision64 = entries:sub(at + ENTRY / 2, at + ENTRY - 1)
    end
    return {'OK', (struct_unpack('>I8', revision64)), 0, bits}
  end

  -- Makes operations of closed epochs, and those that were given up, refused however late they arrive.
  local function bar(origin, barred)
    for i = 1, #barred, 12 do
      local writer, identity = origin .. barred:sub(i, i + 3), barred:sub(i + 4, i + 11)
      local counter, window = struct_unpack('>I4', identity), windows[writer]
      if not window then
        window = new_window(writer)
        local packed = redis.pcall('HGET', state_key, window.name)
        if packed and not error_refusal(packed) then load_window(window, packed) end
      end
      if counter >= window.low_water_mark and window.low_water_mark < CLOSED then
        window.exists = true
        if counter == CLOSED then
          window.low_water_mark = CLOSED
        elseif counter > window.highest then
          window.highest = counter
        end
        -- With the revision that is now: if the window is evicted, what was begun before is refused by `forgotten`.
        local revision = struct_pack('>I8', partition.revision)
        window.added[#window.added + 1] = identity .. string.char(BARRED_BYTE) .. revision:sub(2)
      end
    end
  end

  -- As Redis evicts keys: of a random sample the window that was used least lately; of long ones, if bytes are too
  -- many.
  local function evict_windows(bytes, new)
    for _ = 1, 20 + new do
      local count, too_many_bytes = redis.pcall('HLEN', state_key), bytes > MAX_DEDUP_BYTES
      local too_many = not error_refusal(count) and count > 5 + MAX_WINDOWS -- beside the state's own fields
      if error_refusal(count) or not (too_many or too_many_bytes) then return end
      local sample = redis.pcall('HRANDFIELD', state_key, 20, 'WITHVALUES')
      if error_refusal(sample) or not_callable('HDEL') then return end
      local oldest, last_revision, size
      for i = 1, #sample, 2 do
        local name, packed = sample[i], sample[i + 1]
        if #name == 13 and name:sub(1, 1) == 'w' and (too_many or #packed > 64) then
          local revision = struct_unpack('>I8', '\0' .. packed:sub(-7)) -- without the byte that may say BARRED_BYTE
          if not oldest or revision < last_revision then oldest, last_revision, size = name, revision, #packed end
        end
      end
      if oldest then
        partition.forgotten, bytes = math.max(partition.forgotten, last_revision), bytes - size
        redis.call('HSET', state_key, 'forgotten', string.format('%d', partition.forgotten),
          'dedup_bytes', string.format('%d', bytes))
        redis.call('HDEL', state_key, oldest)
        local window = windows[oldest:sub(2)]
        if window then window.size = 0 end
      end
    end
  end

  local function flush_labels()
    local added, removed = {}, {}
    for member, is_there in pairs(labelled) do
      if is_there then added[#added + 1], added[#added + 2] = '0', member else removed[#removed + 1] = member end
    end
    call_with('ZADD', labels_key, added)
    call_with('ZREM', labels_key, removed)
    labelled = {}
  end

  -- Bits of an answer as 7 bytes each.
  local function pack_bits(bits)
    local packed = ''
    for at = 1, #bits, 56 do
      for byte = at, at + 48, 8 do
        local value = 0
        for i = byte, byte + 7 do value = value * 2 + (bits[i] and 1 or 0) end
        packed = packed .. string.char(value)
      end
    end
    return packed
  end

  -- Index metadata, and the labels that are indexed.

  -- The same, created_at_ms as a u64, and the tail.
  local function parse_meta(meta)
    local updated_before = time_before(meta)
    if updated_before then return updated_before, meta:sub(CREATED_AT, CREATED_AT + 7), meta:sub(TAIL) end
  end

  -- Labels, and where name and root_path begin; nil if the tail is malformed.
  local function parse_tail(tail)
    local labels, last = parse_labels(tail, 1)
    return labels, last and last + 1
  end

  -- The members of the index of labels that go with a tail.
  local function indexed_labels(id, tail)
    local members, labels, names_at = {}, parse_tail(tail)
    if not labels then return members end
    for name, value in pairs(labels) do
      members[string.char(#name) .. name .. struct_pack('>I4', #value) .. value .. id] = true
    end
    local last = text_bounds(tail, names_at)
    local root_at = (last or names_at) + 1
    local root_last, root_first = text_bounds(tail, root_at)
    if root_last and tail:byte(root_at) ~= 192 then -- it is a text, perhaps an empty one
      members['\0' .. struct_pack('>I4', root_last - root_first + 1) .. tail:sub(root_first, root_last) .. id] = true
    end
    return members
  end

  -- Both may be nil: no labels. The index is written by `flush`: what is new of a call before what goes, so that the
  -- key does not vanish and come again.
  local function index_labels(id, before, after)
    local old, new = before and indexed_labels(id, before) or {}, after and indexed_labels(id, after) or {}
    for member in pairs(old) do
      if not new[member] then labelled[member] = false end
    end
    for member in pairs(new) do
      if not old[member] then labelled[member] = true end
    end
  end

  -- The refusal if the index of labels can't be written.
  local function check_labels()
    return error_refusal(redis.pcall('ZCARD', labels_key), 'LAYOUT', 'labels') or not_callable('ZADD')
      or not_callable('ZREM')
  end

  -- Deletion.

  local function delete(operation, before, stored_meta)
    local id = operation.id
    local refusal = error_refusal(redis.pcall('ZCARD', updated_key), 'LAYOUT', 'updated')
      or error_refusal(redis.pcall('HGET', meta_key, id), 'LAYOUT', 'meta')
      or error_refusal(redis.pcall('ZCARD', changes_key), 'LAYOUT', 'changes')
      or error_refusal(redis.pcall('ZCARD', deleted_key), 'LAYOUT', 'deleted')
      or error_refusal(redis.pcall('HGET', deleted_meta_key, id), 'LAYOUT', 'deleted:meta')
      or not_callable('UNLINK') or not_callable('HDEL') or not_callable('HSET') or not_callable('ZRANGE')
      or check_labels() or clock_refusal
    if refusal then return refusal end
    local unlinked = redis.pcall('UNLINK', operation.session_key, operation.turns_key, operation.records_key,
      operation.names_key)
    if error_refusal(unlinked) then return unlinked end -- a replica refuses the first write
    partition.revision = partition.revision + 1
    local revision = string.format('%d', partition.revision)
    local meta = written_metas[id]
    if meta == nil then meta = stored_meta end
    local _, _, tail = parse_meta(meta)
    redis.call('ZREM', updated_key, id)
    redis.call('HDEL', meta_key, id)
    index_labels(id, tail, nil)
    redis.call('ZADD', changes_key, revision, id)
    redis.call('ZADD', deleted_key, revision, id)
    redis.call('HSET', deleted_meta_key, id, now.u64 .. operation.op:sub(1, 8))
    if redis.call('ZCARD', deleted_key) > MAX_TOMBSTONES then
      local oldest = redis.call('ZRANGE', deleted_key, 0, 0, 'WITHSCORES')
      redis.call('ZREM', deleted_key, oldest[1])
      redis.call('ZREM', changes_key, oldest[1])
      redis.call('HDEL', deleted_meta_key, oldest[1])
      redis.call('HSET', state_key, 'compacted', oldest[2])
    end
    return applied(operation, before, now)
  end

  -- Writes, in steps. A step that refuses returns the refusal.

  -- Which commands each group of arguments calls, beside HSET, ZADD and what is tried before anything is written. And
  -- where the values are that must not be empty: the first of them, the distance to the next, and what they are; parts
  -- have their names before them.
  local commands_of, values_of
  local function describe_groups()
    commands_of = {
      W = {'HKEYS', 'HDEL', 'UNLINK'}, c = {'ZREM', 'HDEL'}, u = {'HDEL'}, j = {'HDEL'},
      x = {'LTRIM', 'RPUSH'}, z = {'LTRIM', 'RPUSH'}, q = {'LTRIM', 'RPUSH'}, y = {'LSET'}, v = {'LSET'},
      h = {'RPUSH', 'LTRIM', 'UNLINK'}, S = {'RENAME', 'PERSIST'}, T = {'LMOVE', 'PEXPIRE'},
      N = {'HEXISTS'}, D = {'HDEL', 'ZREM'}, R = {'HDEL', 'ZREM', 'ZRANGE'}, O = {'COPY'},
    }
    values_of = {
      c = {2, 2}, s = {1, 2}, y = {1, 2, 'turn'}, v = {2, 3, 'turn'}, h = {0, 1, 'turn'}, p = {0, 1, 'turn'},
      P = {1, 2, 'records'}, N = {1, 2, 'records'},
    }
  end

  -- The refusal if a value is empty or a command can't be called.
  local function check_groups(operation)
    local first, last, only_cuts = operation.first, operation.last, true
    if not values_of then describe_groups() end
    for letter, from in pairs(first) do
      local called, values = commands_of[letter], values_of[letter]
      for i = 1, called and #called or 0 do
        local refusal = not_callable(called[i])
        if refusal then return refusal end
      end
      if values then
        for i = from + values[1], last[letter], values[2] do
          if ARGV[i] == '' then return {'EMPTY', values[3] or ARGV[i - 1]} end
        end
      end
      -- The others change nothing of a session that is there, if its history is short.
      if not ('rlbgicxzqT'):find(letter, 1, true) then only_cuts = false end
    end
    operation.only_cuts = only_cuts
  end

  -- The refusal if the session was changed by others where the write would change it, too.
  local function check_base(operation, revision, turns, op)
    local first, last = operation.first, operation.last
    local base, base_op = ARGV[first.g]:match('^(%d*):?(.*)$')
    base = tonumber(base)
    if (revision or 0) == base and (base_op == '' or base_op == op) then return nil end
    if not revision then return {'CONFLICT', 0} end
    local changed = {'CHANGED', revision, 'parts'}
    local marks = redis.pcall('HMGET', operation.session_key, '.born', '.reshaped', '.parts')
    local born, reshaped, parts = whole_number(marks[1]), whole_number(marks[2]), whole_number(marks[3])
    if not born or not reshaped or not parts then return {'CORRUPT', '.born'} end
    if base > 0 and born > base then return {'CONFLICT', revision} end
    if revision <= base then return changed end
    -- Turns: what was pushed since may be there if it is left alone, and is none of those that are pushed or put now.
    local base_turns = tonumber(ARGV[first.g + 1])
    local cuts_end = first.z or first.q or first.h or first.S or first.x and ARGV[last.x] ~= '-1'
    if first.p or first.x or first.y or cuts_end then
      local more, brings = turns - base_turns, first.p or first.y
      if reshaped > base or more < 0 or cuts_end and more > 0 or brings and more > MAX_COMPARED then
        return {'CHANGED', revision, 'turns'}
      end
      if brings and more > 0 then
        local brought_ids, others = {}, redis.pcall('LRANGE', operation.turns_key, base_turns, -1)
        if error_refusal(others) then return error_refusal(others, 'CORRUPT', 'history.turns') end
        for i = first.p or 1, first.p and last.p or 0 do brought_ids[id_of(ARGV[i]) or ''] = true end
        for i = first.y or 1, first.y and last.y or 0, 2 do brought_ids[id_of(ARGV[i + 1]) or ''] = true end
        for i = 1, #others do
          if brought_ids[id_of(others[i]) or false] then return {'CHANGED', revision, 'turns'} end
        end
      end
    end
    -- Parts.
    if not first.e then return nil end
    local sha1hex = redis.sha1hex
    local same_parts = not sha1hex and parts <= base -- for fakeredis; a restore may have lost what this was made from
    if not (same_parts or sha1hex) then return changed end
    local names = {}
    for i = first.s or 1, first.s and last.s or 0, 2 do names[#names + 1] = ARGV[i] end
    for i = first.u or 1, first.u and last.u or 0 do names[#names + 1] = ARGV[i] end
    for at = 1, #names, MAX_VALUES do
      local to = math.min(at + MAX_VALUES - 1, #names)
      local values = redis.pcall('HMGET', operation.session_key, unpack(names, at, to))
      for i = at, to do
        local name, value = names[i], values[i - at + 1]
        local is_time = name == 'updated_at_ms'
        local same = same_parts and not is_time
        if not same and sha1hex then same = (value and sha1hex(value):sub(1, 16) or '') == ARGV[first.e + i - 1] end
        if not same then
          if not is_time then return changed end
          -- It never collides: the later one holds, at most now.
          local mine, theirs = parse_integer(ARGV[first.s + 2 * i - 1]), value and parse_integer(value)
          if mine and theirs and now then
            operation.later_time = pack_integer(math.min(math.max(mine, theirs), now.ms))
          end
        end
      end
    end
  end

  -- Returns the refusal, once the turns that were pushed are gone again.
  local function undo_push(operation, pushed, refusal)
    local undone = pushed == 0 or redis.pcall('LTRIM', operation.turns_key, 0, -1 - pushed)
    if not error_refusal(undone) then return refusal end
    -- Worded like the server's error for a script that it stopped: the outcome is unknown.
    return redis.error_reply('ERR stopped in user_script: turns could not be taken back')
  end

  -- Which of the stored turns are kept, from 0, as of the groups x, z and q.
  local function kept_turns(operation, stored)
    local first, from, to = operation.first, 0, stored - 1
    if first.x then
      from, to = math.min(tonumber(ARGV[first.x]), stored), tonumber(ARGV[first.x + 1])
      if to < 0 or to >= stored then to = stored - 1 end
    elseif first.z then
      to = math.max(stored - 1 - ARGV[first.z], -1)
    elseif first.q then
      to = math.min(stored, ARGV[first.q]) - 1
    end
    return from, to
  end

  -- The refusal if the turns can't be changed as asked; or nil, and `plan`: what is still to be done.
  -- Pushes at once where nothing else is done to turns: RPUSH replies with the length, which is what is checked.
  local function prepare_turns(operation, stored)
    local first, last, turns_key = operation.first, operation.last, operation.turns_key
    local from, to = kept_turns(operation, stored)
    local plan = {from = from, to = to, stored = stored, pushed = 0, push = first.p, reshapes = false}
    local cut = from > 0 or to < stored - 1
    if first.p and not (cut or first.y or first.v) then
      plan.pushed = math.min(last.p - first.p + 1, MAX_VALUES)
      plan.push = first.p + plan.pushed
      local length = redis.pcall('RPUSH', turns_key, unpack(ARGV, first.p, first.p + plan.pushed - 1))
      local refusal = error_refusal(length, 'CORRUPT', 'history.turns')
      if refusal then return not_callable('RPUSH') or refusal end
      if length ~= stored + plan.pushed then return undo_push(operation, plan.pushed, {'CORRUPT', 'history.turns'}) end
      return nil, plan
    end
    plan.reshapes = cut or first.y or first.v or first.h or first.S
    if not plan.reshapes then return nil, plan end
    local length = redis.pcall('LLEN', turns_key)
    local refusal = error_refusal(length, 'CORRUPT', 'history.turns')
    if refusal then return refusal end
    plan.length = length
    if not first.W and length ~= stored then return {'CORRUPT', 'history.turns'} end
    if first.S then
      local staged = redis.pcall('LLEN', operation.staging_key)
      if error_refusal(staged) then return staged end
      if staged ~= tonumber(ARGV[first.S]) then return {'STAGING'} end
    end
    for i = first.y or 1, first.y and last.y or 0, 2 do
      if not (ARGV[i] - (to - from + 1) < 0) then return {'CORRUPT', 'history.turns'} end
    end
    if first.v then
      local turn = redis.pcall('LINDEX', turns_key, ARGV[first.v])
      if error_refusal(turn) then return turn end
      if not turn or id_of(turn) ~= ARGV[first.v + 1] then return {'CHANGED', partition.revision, 'parts'} end
    end
    if first.p then return not_callable('RPUSH'), plan end
    return nil, plan
  end

  -- Changes the turns as planned. Returns their number. A key that vanishes is not written again: what is new is pushed
  -- before what was there is trimmed to nothing.
  local function change_turns(operation, plan)
    local first, last, turns_key = operation.first, operation.last, operation.turns_key
    if first.S then
      redis.call('RENAME', operation.staging_key, turns_key)
      redis.call('PERSIST', turns_key)
      return tonumber(ARGV[first.S])
    end
    if first.h then
      if last.h < first.h then
        redis.call('UNLINK', turns_key)
        return 0
      end
      call_in_batches('RPUSH', turns_key, first.h, last.h)
      if plan.length > 0 then redis.call('LTRIM', turns_key, plan.length, -1) end
      return last.h - first.h + 1
    end
    local kept, pushes = plan.to - plan.from + 1, plan.push and plan.push <= last.p
    if first.T then
      for _ = kept + 1, plan.stored do redis.call('LMOVE', turns_key, operation.staging_key, 'RIGHT', 'LEFT') end
      redis.call('PEXPIRE', operation.staging_key, ARGV[first.T])
      return kept
    end
    local cut = kept < plan.stored
    if cut and kept > 0 then redis.call('LTRIM', turns_key, plan.from, plan.to) end
    for i = first.y or 1, first.y and last.y or 0, 2 do redis.call('LSET', turns_key, ARGV[i], ARGV[i + 1]) end
    if first.v then redis.call('LSET', turns_key, ARGV[first.v], ARGV[first.v + 2]) end
    if pushes then call_in_batches('RPUSH', turns_key, plan.push, last.p) end
    if cut and kept == 0 then redis.call('LTRIM', turns_key, plan.stored, -1) end
    return kept + (first.p and last.p - first.p + 1 or 0)
  end

  -- The refusal if the labels would be too many; or nil, created_at, the tail, and whether that is new.
  local function new_tail(operation, created_at, tail)
    local first, last = operation.first, operation.last
    if not (first.m or first.L or first.j or first.c or first.W) then return nil, created_at, tail, false end
    local labels, names_at = nil, nil
    if tail then labels, names_at = parse_tail(tail) end
    local packed, names = '\128', nil
    if labels then packed, names = tail:sub(1, names_at - 1), tail:sub(names_at) end
    if first.c and not tail then created_at, names = now.u64, ARGV[first.c] end
    if first.m then
      if ARGV[first.m] ~= '' then created_at = ARGV[first.m] end
      if ARGV[first.m + 1] ~= '' then names = ARGV[first.m + 1] end
    end
    if first.L then packed = ARGV[first.L] end
    if first.j then
      labels = parse_labels(packed, 1)
      for i = first.j, last.j, 2 do labels[ARGV[i]] = ARGV[i + 1] ~= '' and ARGV[i + 1] or nil end
      local none = packed == '\128' -- what is there under that name, if anything, is no labels
      packed = pack_labels(labels)
      if not packed then return {'LABELS'} end
      operation.packed_labels = not (none and packed == '\128') and packed or nil
    end
    return nil, created_at, packed .. (names or '\192\192'), true
  end

  -- The hash: parts that are set, removed; what is the store's own.
  local function write_parts(operation, revision, turns, time, exists, plan, moves)
    local first, last, session_key = operation.first, operation.last, operation.session_key
    local values = {'.revision', revision, '.op', operation.op}
    local function set(name, value) values[#values + 1], values[#values + 2] = name, value end
    if plan.touches then set('.turns', string.format('%d', turns)) end
    if not exists then set('.born', revision) end
    if plan.reshapes or not exists then set('.reshaped', revision) end
    local parts = not exists or first.W or first.u or first.j
    for i = first.s or 1, first.s and last.s or 0, 2 do parts = parts or ARGV[i] ~= 'updated_at_ms' end
    if parts then set('.parts', revision) end
    if not exists and first.c then
      for i = first.c + 1, last.c do values[#values + 1] = ARGV[i] end
      set('created_at_ms', '\207' .. now.u64)
    end
    if moves then set('updated_at_ms', '\207' .. time.u64) end
    local labels = operation.packed_labels
    if labels and labels ~= '\128' then set('metadata.labels', labels) end
    local from, to = first.s or 1, first.s and last.s or 0
    local at_once = math.min(to, from + MAX_VALUES - 1)
    for i = from, at_once do values[#values + 1] = ARGV[i] end
    local old = exists and first.W and redis.call('HKEYS', session_key)
    redis.call('HSET', session_key, unpack(values))
    call_in_batches('HSET', session_key, at_once + 1, to)
    if first.u then call_in_batches('HDEL', session_key, first.u, last.u) end
    if operation.later_time then redis.call('HSET', session_key, 'updated_at_ms', operation.later_time) end
    if operation.packed_labels == '\128' then redis.call('HDEL', session_key, 'metadata.labels') end
    if old then
      local named = {}
      for i = from, to, 2 do named[ARGV[i]] = true end
      for _, name in ipairs(old) do
        if not named[name] and not name:find('^%.[^.]') then redis.call('HDEL', session_key, name) end
      end
    end
  end

  -- The refusal if records can't be written.
  local function check_records(operation)
    if not operation.records_key then return nil end
    return error_refusal(redis.pcall('HLEN', operation.records_key), 'CORRUPT', 'records')
      or error_refusal(redis.pcall('ZCARD', operation.names_key), 'CORRUPT', 'records')
  end

  -- Removes members of a key; what has vanished is not touched again.
  local function remove(command, left, key, names)
    for at = 1, #names, MAX_VALUES do
      if left == 0 then return end
      left = left - redis.call(command, key, unpack(names, at, math.min(at + MAX_VALUES - 1, #names)))
    end
  end

  -- Puts first, then looks for what goes, then drops that, so that no key vanishes and is written again. Adds to `bits`
  -- whether each new one was put.
  local function write_records(operation, bits)
    local first, last = operation.first, operation.last
    local records_key, names_key = operation.records_key, operation.names_key
    local named, dropped = {}, {}
    local function put(i)
      redis.call('HSET', records_key, ARGV[i], ARGV[i + 1])
      redis.call('ZADD', names_key, '0', ARGV[i])
    end
    local function drop(name)
      if not named[name] then named[name], dropped[#dropped + 1] = true, name end
    end
    for i = first.P or 1, first.P and last.P or 0, 2 do
      put(i)
      named[ARGV[i]] = true
    end
    for i = first.N or 1, first.N and last.N or 0, 2 do
      local new = redis.call('HEXISTS', records_key, ARGV[i]) == 0
      if new then put(i) end
      named[ARGV[i]], bits[#bits + 1] = true, new
    end
    for i = first.D or 1, first.D and last.D or 0 do drop(ARGV[i]) end
    for i = first.R or 1, first.R and last.R or 0 do
      local found = redis.call('ZRANGE', names_key, '[' .. ARGV[i], '[' .. ARGV[i] .. '\255', 'BYLEX')
      for _, name in ipairs(found) do drop(name) end
    end
    if #dropped == 0 then return end
    remove('HDEL', redis.call('HLEN', records_key), records_key, dropped)
    remove('ZREM', redis.call('ZCARD', names_key), names_key, dropped)
  end

  -- When a session is updated; and whether its own updated_at_ms moves with that, though the write does not name it.
  local function new_time(operation, plan, updated_before)
    local first = operation.first
    local moves = first.n or plan.reshapes or first.p
    local time = now
    if first.t and (first.W or not moves) then
      time = time_of(ARGV[first.t])
      if time.ms > now.ms then time = now end
    elseif not moves and updated_before then
      time = time_of(string.format('%.0f', updated_before))
    end
    if updated_before and updated_before > time.ms and (first.k or not first.W) then
      time = time_of(string.format('%.0f', updated_before))
    end
    return time, not first.t and (moves or not updated_before)
  end

  local function write(operation, exists, stored_turns, stored_meta)
    if write_refusal then return write_refusal end
    local first, meta = operation.first, written_metas[operation.id]
    if meta == nil then meta = stored_meta end
    local updated_before, created_at, tail = parse_meta(meta)
    if exists and not updated_before and not first.W then return {'CORRUPT', 'meta'} end
    if not exists then updated_before, tail = nil, nil end
    local refusal = check_groups(operation) or check_records(operation)
    if refusal then return refusal end
    local tail_is_new, before = nil, tail
    refusal, created_at, tail, tail_is_new = new_tail(operation, created_at, tail)
    if refusal then return refusal end
    if tail_is_new then refusal = check_labels() end
    if not refusal and not exists then
      refusal = error_refusal(redis.pcall('ZCARD', deleted_key), 'LAYOUT', 'deleted') or not_callable('ZREM')
        or not_callable('HDEL')
    end
    if refusal then return refusal end
    local plan
    refusal, plan = prepare_turns(operation, stored_turns)
    if refusal then return refusal end
    if exists and operation.only_cuts and not plan.reshapes then return {'OK', exists, updated_before, '', exists} end
    plan.touches = plan.reshapes or first.p or not exists
    local time, moves = new_time(operation, plan, updated_before)
    local revision = string.format('%d', partition.revision + 1)
    refusal = add_to_indexes(operation.id, time, revision, updated_before)
    if refusal then return undo_push(operation, plan.pushed, refusal) end

    partition.revision = partition.revision + 1
    local turns = plan.touches and change_turns(operation, plan) or stored_turns
    write_parts(operation, revision, turns, time, exists, plan, moves)
    local bits = first.c and {not exists} or first.N and {false} or nil
    if operation.records_key then write_records(operation, bits) end
    if tail_is_new and tail ~= before then index_labels(operation.id, before, tail) end
    if not exists then
      redis.call('ZREM', deleted_key, operation.id)
      redis.call('HDEL', deleted_meta_key, operation.id)
    end
    return applied(operation, exists or 0, time, turns, created_at .. tail, bits)
  end

  -- Makes a session from another one of the partition, without its bodies passing through here.
  local function fork(operation)
    local first, source = operation.first, operation.source
    local source_id = source[1]:sub(id_at)
    local stored = redis.pcall('HMGET', source[1], '.revision', 'version', '.turns')
    local length = redis.pcall('LLEN', source[2])
    local refusal = write_refusal or check_labels() or check_groups(operation) or not_callable('COPY')
      or not_callable('LTRIM') or not_callable('ZREM') or not_callable('HDEL')
      or error_refusal(redis.pcall('ZCARD', deleted_key), 'LAYOUT', 'deleted')
    if refusal then return refusal end
    refusal = error_refusal(stored, 'CORRUPT', 'session') or error_refusal(length, 'CORRUPT', 'history.turns')
      or first.O and (error_refusal(redis.pcall('HLEN', source[3]), 'CORRUPT', 'records')
        or error_refusal(redis.pcall('ZCARD', source[4]), 'CORRUPT', 'records'))
    if refusal then
      refusal[3] = 'source'
      return refusal
    end
    local revision, turns = whole_number(stored[1]), whole_number(stored[3])
    if not revision and redis.pcall('EXISTS', source[1]) == 1 then return {'CORRUPT', '.revision', 'source'} end
    if not revision then return {'NOTFOUND', '', 'source'} end
    if first.r and tonumber(ARGV[first.r]) ~= revision then return {'CONFLICT', revision, 'source'} end
    if stored[2] ~= ARGV[2] then return {'VERSION', stored[2] or '', 'source'} end
    local meta = written_metas[source_id]
    if meta == nil then meta = redis.pcall('HGET', meta_key, source_id) end
    refusal = error_refusal(meta)
    if refusal then return refusal end
    local _, _, tail = parse_meta(meta)
    if not tail then return {'CORRUPT', 'meta', 'source'} end
    if length ~= turns then return {'CORRUPT', 'history.turns', 'source'} end
    refusal = add_to_indexes(operation.id, now, string.format('%d', partition.revision + 1), nil)
    if refusal then return refusal end

    partition.revision = partition.revision + 1
    local number = string.format('%d', partition.revision)
    redis.call('COPY', source[1], operation.session_key, 'REPLACE')
    if first.q then length = math.min(turns, ARGV[first.q]) end
    if length > 0 then
      redis.call('COPY', source[2], operation.turns_key, 'REPLACE')
      if length < turns then redis.call('LTRIM', operation.turns_key, 0, length - 1) end
    end
    if first.O then
      redis.call('COPY', source[3], operation.records_key, 'REPLACE')
      redis.call('COPY', source[4], operation.names_key, 'REPLACE')
    end
    local origin = '\131' .. pack_text('id') .. pack_text(source_id) .. pack_text('revision') .. pack_integer(revision)
      .. pack_text('length') .. pack_integer(length)
    redis.call('HSET', operation.session_key,
      '.revision', number, '.op', operation.op, '.turns', string.format('%d', length),
      '.born', number, '.reshaped', number, '.parts', number, 'metadata.forked_from', origin,
      'created_at_ms', '\207' .. now.u64, 'updated_at_ms', '\207' .. now.u64)
    index_labels(operation.id, nil, tail)
    redis.call('ZREM', deleted_key, operation.id)
    redis.call('HDEL', deleted_meta_key, operation.id)
    return applied(operation, 0, now, length, now.u64 .. tail)
  end

  return {
    id_of = id_of, remembered = remembered, bar = bar, evict_windows = evict_windows, flush_labels = flush_labels,
    pack_bits = pack_bits, delete = delete, check_base = check_base, undo_push = undo_push, write = write, fork = fork,
  }
end

for i = 1, n do
  local operation = operations[i]
  local deletes, revision, version, turns, op = operation.kind == 'd', nil, nil, nil, nil
  if deletes then flush() end -- else what is pending would be written after it
  local item = partition.revision < operation.high_water_mark and {'RESET', partition.revision}
    or earlier_answer(operation)
  if not item then item, revision, version, turns, op = read_session(operation) end
  item = item or check_conditions(operation, revision, turns or 0, op)
  if not item and deletes then item = rest().delete(operation, revision or 0, metas[i]) end
  if not item and operation.kind == 'f' then item = rest().fork(operation) end
  if not item and revision and version ~= ARGV[2] then item = {'VERSION', version or ''} end
  if not item and operation.only_pushes and revision then item = push(operation, turns or -1, metas[i]) end
  items[i] = item or rest().write(operation, revision, turns or (revision and -1 or 0), metas[i])
end
flush()
return items
