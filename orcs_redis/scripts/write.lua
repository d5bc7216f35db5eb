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
--     then for each operation
--       . {p}:session:<id> HASH  one msgpack field per section; .revision, .turns (their number), .op
--       . {p}:turns:<id>   LIST  one msgpack value per turn
--       . {p}:lease:<id>   HASH  (with a lease only) token and more: see lease.lua
--       . {p}:staging:<name> LIST (mode "staged" only) the turns that are to replace the history
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
--         38 kind: "a" append, "s" save, "d" delete
--         39 flags. "r", "l", "b": these arguments follow, in this order; "k": updated_at_ms is not lowered
--       . r: the revision that is to be overwritten; 0: the session must be absent. After a colon may follow the
--         operation id that made it: a restore can reuse a revision
--       . l: fencing token of the lease under which to write
--       . b: what is barred, 12 bytes each: epoch (of the same origin), counter and nonce of an operation that was
--         given up without an answer; counter 0xffffffff: an epoch all of whose operations are finished
--       append: the turns. save:
--       . updated_at_ms, decimal (an append takes the server's now, but never goes backwards)
--       . tail of the index metadata (an append leaves it as it is)
--       . mode of the history: "push" turns; "replace" it by turns; "staged": rename the staging key; "edit" it
--       . number of pairs of section and value, then the pairs
--       . number of sections to remove, then their names
--       . push, replace: the turns. staged: their number. edit: index of the first and last to keep, number of
--         pairs of index and turn, the pairs, then turns to push
--
-- Reply, an array with one item for each operation: a server error, or an array
--   "OK", revision, updated_at_ms    applied now, or by an earlier attempt of this operation (updated_at_ms: 0 then)
--   "CONFLICT", revision             the session is at another revision (0: absent)
--   "LEASELOST"                      the lease ended or passed to another
--   "NOTFOUND"                       append, delete: no such session
--   "CORRUPT", part                  what is stored can't be what this script wrote
--   "VERSION", msgpack               the stored session has another schema version
--   "STAGING"                        the staged turns are not all there: their own commands failed
--   "EMPTY", part                    a turn or section of no bytes
--   "FORGOTTEN", revision            barred, or below the low-water mark; or it may have been in an evicted window
--   "DENIED", command                the user may not call it
--   "MISSING", command               the server has no such command, or it was renamed
--   "RESET", revision                another incarnation (revision -1), or revisions went back
--   "LAYOUT", part                   a partition's key has a foreign type
-- For every item but "OK" nothing was written. An error in place of the array that was raised while the script ran
-- does not say what was written.
--
-- Index metadata: msgpack array [revision u64, updated_at_ms u64, turns u32, origin bin 8, created_at_ms, name,
-- root_path], of which the first four have fixed widths (34 bytes with the array's first byte), and the rest is the
-- tail. The origin is the store that wrote last. updated_at_ms is at most the server's now.
-- .op: the id of the operation that made the revision.
-- Dedup window, a field of the state: "w" and the writer. It holds u32 low-water mark, u32 the highest counter so far,
-- u64 `forgotten_at_birth`, the partition's `forgotten` when it was made; then entries of 16 bytes in the order of
-- writing, one for each of the writer's operations that were applied: u32 counter, nonce, u64 revision; and one for
-- each that was barred: instead of its own, the partition's revision then, with the first byte 0x80. Entries at the
-- front that are below the low-water mark are trimmed, but for the last. What is neither in the window nor below that
-- mark was not applied, unless it may have been in an earlier window: then its high-water mark is below
-- `forgotten_at_birth`. A window that is evicted leaves its last revision in `forgotten`.
-- Message, on the channel {p}:changes:<incarnation> and on that with :<id>, the session's own: msgpack array [revision
-- u64, updated_at_ms u64, kind (0 saved, 1 deleted), origin bin 8, id].

local MAX_WINDOWS = 10000       -- per partition; beyond them one is evicted that was not used for long
local MAX_DEDUP_BYTES = 4194304 -- of all windows of a partition; the same
local MAX_TOMBSTONES = 10000    -- per partition
local MAX_VALUES = 4000         -- in one command: Lua's stack is short
local ENTRY = 16                -- bytes of an entry in a dedup window
local CLOSED = 4294967295       -- low-water mark of an epoch of which nothing is to come
local BARRED_BYTE = 128         -- first byte of the revision in the entry of what is barred

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
      if command == 'RENAME' then
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

local state_key, updated_key, meta_key, changes_key, deleted_key, deleted_meta_key = unpack(KEYS, 1, 6)
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

-- The arguments that the flags announce.
local function parse_conditions(operation, flags, lease_key)
  local first = operation.first
  if flags:find('r', 1, true) then
    operation.expected, operation.expected_op = ARGV[first]:match('^(%d*):(.*)$')
    operation.expected, first = operation.expected or ARGV[first], first + 1
  end
  if flags:find('l', 1, true) then
    operation.fencing_token, operation.lease_key, first = ARGV[first], lease_key, first + 1
  end
  if flags:find('b', 1, true) then
    operation.barred, first = ARGV[first], first + 1
  end
  if flags:find('k', 1, true) then operation.keeps_time = true end
  operation.first = first
end

local n, key, argument, id_at = 0, 7, 3, #meta_key + 5 -- where the id begins in {p}:session:<id>
while ARGV[argument] do
  local header = ARGV[argument]
  local argument_count, key_count, writer, identity, high_water_mark, low_water_mark, kind, flags_at =
    struct_unpack('>I4Bc12c8I8I4c1', header)
  local window = windows[writer]
  if not window then
    window = new_window(writer)
    fields[#fields + 1] = window.name
  end
  local operation = { -- parse_conditions and parse_save add to it
    kind = kind, id = KEYS[key]:sub(id_at), session_key = KEYS[key], turns_key = KEYS[key + 1],
    op = writer .. identity, identity = identity, counter = struct_unpack('>I4', identity), window = window,
    high_water_mark = high_water_mark, low_water_mark = low_water_mark,
    mode = 'push', first = argument + 1, last = argument + argument_count, -- its arguments: the rest of them are turns
  }
  if key_count > 2 then operation.staging_key = KEYS[key + key_count - 1] end
  if #header >= flags_at then parse_conditions(operation, header:sub(flags_at), KEYS[key + 2]) end
  n, key, argument = n + 1, key + key_count, operation.last + 1
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

-- The revision in an operation's entry, 8 bytes; nil if it has none.
local function find_entry(window, identity)
  local entries = window.entries .. table.concat(window.added)
  local at = entries:find(identity, 1, true)
  while at and at % ENTRY ~= 1 do at = entries:find(identity, at + 1, true) end
  return at and entries:sub(at + #identity, at + ENTRY - 1)
end

-- The item of an operation that was applied before, or may have been; false for one that was not.
local function earlier_answer(operation)
  local window, forgotten = operation.window, partition.forgotten
  if window.exists then
    if operation.counter < window.low_water_mark then
      return {'FORGOTTEN', partition.revision} -- it arrives late: its store has finished with it
    end
    if operation.counter <= window.highest then
      local revision64 = find_entry(window, operation.identity)
      if revision64 and revision64:byte() == BARRED_BYTE then return {'FORGOTTEN', partition.revision} end
      if revision64 then return {'OK', (struct_unpack('>I8', revision64)), 0} end
    end
    forgotten = window.forgotten_at_birth or forgotten
  end
  return forgotten > operation.high_water_mark and {'FORGOTTEN', partition.revision}
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

-- As Redis evicts keys: of a random sample the window that was used least lately; of long ones, if bytes are too many.
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

-- What the operations since the last `flush` write together.
local indexed = false -- whether the indexes have the first of the call: see add_to_indexes
local updated, changes, packed_metas, messages = {}, {}, {}, {}

local function flush()
  if #messages == 0 then return end
  if #updated > 0 then
    redis.call('ZADD', updated_key, unpack(updated))
    redis.call('ZADD', changes_key, unpack(changes))
  end
  if #packed_metas > 0 then redis.call('HSET', meta_key, unpack(packed_metas)) end
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
  if bytes and not error_refusal(bytes) and (new > 0 or bytes > MAX_DEDUP_BYTES) then evict_windows(bytes, new) end
  local channel = changes_key .. ':' .. ARGV[1]
  for _, message in ipairs(messages) do
    redis.pcall('PUBLISH', channel, message)
    redis.pcall('PUBLISH', channel .. ':' .. message:sub(33), message) -- it ends with the id
  end
end

-- Notes that an operation was applied, for `flush` and for the operations that follow. Returns its item.
local function applied(operation, time, turns, tail)
  local ARRAY_5, ARRAY_7, U32, U64, BIN_8, STR = '\149', '\151', '\206', '\207', '\196\8', '\217' -- msgpack
  local id, window, revision64 = operation.id, operation.window, struct_pack('>I8', partition.revision)
  local origin, message_kind = operation.op:sub(1, 8), '\1'
  window.exists, window.added[#window.added + 1] = true, operation.identity .. revision64
  if operation.counter > window.highest then window.highest = operation.counter end
  if operation.low_water_mark > window.low_water_mark then window.low_water_mark = operation.low_water_mark end
  if operation.barred then bar(origin, operation.barred) end

  local revision_and_time = U64 .. revision64 .. U64 .. time.u64
  if turns then
    local meta = ARRAY_7 .. revision_and_time .. U32 .. struct_pack('>I4', turns) .. BIN_8 .. origin .. tail
    local n = #packed_metas
    packed_metas[n + 1], packed_metas[n + 2] = id, meta
    written_metas[id], message_kind = meta, '\0'
  else
    written_metas[id] = false
  end
  messages[#messages + 1] = ARRAY_5 .. revision_and_time .. message_kind .. BIN_8 .. origin
    .. STR .. string.char(#id) .. id
  return {'OK', partition.revision, time.ms}
end

-- The refusal if the session can't be read; or nil, then what is stored: revision (nil: absent), version, turns, op.
-- `foreign`: what is left is no session (a foreign type, no revision, an evicted hash); only a delete goes on.
local function read_session(operation)
  local kind, session_key = operation.kind, operation.session_key
  local stored = redis.pcall('HMGET', session_key, '.revision', 'version', '.turns', '.op')
  local refusal = error_refusal(stored, 'CORRUPT', 'session')
  local foreign = refusal ~= nil
  if foreign then
    if kind ~= 'd' or refusal.err then return refusal end
    stored = {}
  end
  local revision = whole_number(stored[1])
  if not revision and not foreign then
    local exists = redis.pcall('EXISTS', session_key)
    refusal = error_refusal(exists)
    if refusal then return refusal end
    if exists == 1 then
      if kind ~= 'd' then return {'CORRUPT', '.revision'} end
      foreign = true
    else
      local tombstone = redis.pcall('HGET', deleted_meta_key, operation.id)
      local change = not tombstone and redis.pcall('ZSCORE', changes_key, operation.id)
      refusal = error_refusal(tombstone, 'LAYOUT', 'deleted:meta') or error_refusal(change, 'LAYOUT', 'changes')
      if refusal then return refusal end
      if change then -- no tombstone, and yet it was there: its hash was evicted by maxmemory
        if kind == 'a' then return {'CORRUPT', 'session'} end
        foreign = kind == 'd'
      end
    end
  end
  if foreign then operation.foreign = true end
  return nil, revision, stored[2], tonumber(stored[3]), stored[4]
end

local function delete(operation)
  local id = operation.id
  local refusal = error_refusal(redis.pcall('ZCARD', updated_key), 'LAYOUT', 'updated')
    or error_refusal(redis.pcall('HGET', meta_key, id), 'LAYOUT', 'meta')
    or error_refusal(redis.pcall('ZCARD', changes_key), 'LAYOUT', 'changes')
    or error_refusal(redis.pcall('ZCARD', deleted_key), 'LAYOUT', 'deleted')
    or error_refusal(redis.pcall('HGET', deleted_meta_key, id), 'LAYOUT', 'deleted:meta')
    or not_callable('UNLINK') or not_callable('ZREM') or not_callable('HDEL') or not_callable('ZADD')
    or not_callable('HSET') or not_callable('ZRANGE') or clock_refusal
  if refusal then return refusal end
  local unlinked = redis.pcall('UNLINK', operation.session_key, operation.turns_key)
  if error_refusal(unlinked) then return unlinked end -- a replica refuses the first write
  partition.revision = partition.revision + 1
  local revision = string.format('%d', partition.revision)
  redis.call('ZREM', updated_key, id)
  redis.call('HDEL', meta_key, id)
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
  return applied(operation, now)
end

-- Save and append, in steps. A step that refuses returns the refusal.

-- The arguments of a save, from operation.first:
--   updated_at_ms | tail | mode | n | n pairs of section and value | m | m sections to remove | what the mode needs
--   first                             sections                           removals               rest
local function parse_save(operation)
  local first, mode = operation.first, ARGV[operation.first + 2]
  local sections = first + 4
  local removals = sections + 2 * ARGV[first + 3] + 1
  local rest = removals + ARGV[removals - 1]
  operation.mode, operation.first = mode, rest
  operation.save = {
    updated_at_ms = ARGV[first], tail = ARGV[first + 1],
    sections = sections, sections_last = removals - 2, removals = removals, removals_last = rest - 1,
  }
  if mode == 'edit' then
    local pairs_last = rest + 2 + 2 * ARGV[rest + 2]
    operation.edit = {first = ARGV[rest], last = ARGV[rest + 1], pairs = rest + 3, pairs_last = pairs_last}
    operation.first = pairs_last + 1
  elseif mode == 'staged' then
    operation.staged, operation.first = tonumber(ARGV[rest]), operation.last + 1
  end
  for i = sections + 1, removals - 2, 2 do
    if ARGV[i] == '' then return {'EMPTY', ARGV[i - 1]} end
  end
  return not_callable('ZREM') or not_callable('HDEL')
    or mode == 'replace' and (not_callable('UNLINK') or not_callable('RPUSH'))
    or mode == 'staged' and (not_callable('RENAME') or not_callable('PERSIST'))
    or mode == 'edit' and (not_callable('LTRIM') or not_callable('LSET') or not_callable('RPUSH'))
end

-- The refusal if a turn is empty or an edit is out of range. Arguments are strings: arithmetic makes numbers of them,
-- comparison does not; hence `a - b < 0`.
local function check_turns(operation)
  local edit = operation.edit
  if edit then
    edit.kept = edit.last - edit.first + 1
    for i = edit.pairs, edit.pairs_last, 2 do
      if ARGV[i + 1] == '' then return {'EMPTY', 'turn'} end
      if not (ARGV[i] - edit.kept < 0) then return {'CORRUPT', 'history.turns'} end
    end
  end
  for i = operation.first, operation.last do
    if ARGV[i] == '' then return {'EMPTY', 'turn'} end
  end
end

-- Returns the refusal, once the turns that were pushed are gone again.
local function undo_push(operation, pushed, refusal)
  if pushed == 0 or not error_refusal(redis.pcall('LTRIM', operation.turns_key, 0, -1 - pushed)) then return refusal end
  -- Worded like the server's error for a script that it stopped: the outcome is unknown.
  return redis.error_reply('ERR stopped in user_script: turns could not be taken back')
end

-- Pushes before the list is checked: RPUSH replies with its length. The refusal if that is wrong; or nil, the length of
-- the list, and how many were pushed.
local function push_turns(operation, stored_turns)
  local mode, first = operation.mode, operation.first
  local length, pushed = nil, 0
  if mode == 'push' and first <= operation.last then
    pushed = math.min(operation.last - first + 1, MAX_VALUES)
    length = redis.pcall('RPUSH', operation.turns_key, unpack(ARGV, first, first + pushed - 1))
    operation.first = first + pushed
  else
    length = redis.pcall('LLEN', operation.turns_key)
  end
  local refusal = error_refusal(length, 'CORRUPT', 'history.turns')
  if refusal then return pushed > 0 and not_callable('RPUSH') or refusal end
  if (mode == 'push' or mode == 'edit') and length ~= stored_turns + pushed
    or mode == 'edit' and operation.edit.last - length >= 0 then
    return undo_push(operation, pushed, {'CORRUPT', 'history.turns'})
  end
  if mode == 'staged' then
    local staged = redis.pcall('LLEN', operation.staging_key)
    if error_refusal(staged) then return staged end
    if staged ~= operation.staged then return {'STAGING'} end
  end
  return nil, length, pushed
end

-- The first operation of a call goes into both indexes at once: a full server, or an index of a foreign type, shows
-- before anything else is written; if the second refuses, the first is as before. The others follow in `flush`.
local function add_to_indexes(id, time, revision, updated_before)
  if indexed then
    local n = #updated
    updated[n + 1], updated[n + 2], changes[n + 1], changes[n + 2] = time.text, id, revision, id
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

-- Calls a command with arguments of this script. Returns the last reply, nil if there are no arguments.
local function call_in_batches(command, key, first, last)
  local reply
  for i = first, last, MAX_VALUES do
    reply = redis.call(command, key, unpack(ARGV, i, math.min(i + MAX_VALUES - 1, last)))
  end
  return reply
end

-- What becomes of the turns that are there. Returns their number.
local function rewrite_turns(operation, length)
  local mode, turns_key, edit = operation.mode, operation.turns_key, operation.edit
  if mode == 'replace' then
    redis.call('UNLINK', turns_key)
    length = 0
  elseif mode == 'staged' then
    redis.call('RENAME', operation.staging_key, turns_key)
    redis.call('PERSIST', turns_key)
    length = operation.staged
  elseif mode == 'edit' then
    redis.call('LTRIM', turns_key, edit.first, edit.last)
    for i = edit.pairs, edit.pairs_last, 2 do redis.call('LSET', turns_key, ARGV[i], ARGV[i + 1]) end
    length = edit.kept
  end
  return length
end

local function write_sections(operation, revision, length)
  local session_key, save = operation.session_key, operation.save
  local last = math.min(save.sections + MAX_VALUES - 1, save.sections_last)
  redis.call('HSET', session_key, '.revision', revision, '.op', operation.op, '.turns', length,
    unpack(ARGV, save.sections, last))
  call_in_batches('HSET', session_key, last + 1, save.sections_last)
  call_in_batches('HDEL', session_key, save.removals, save.removals_last)
end

-- When the session was updated before, in ms, and the tail of its metadata; nil if `meta` is missing or malformed.
local function parse_meta(meta)
  local UPDATED_AT, TAIL = 12, 35 -- where they begin
  if not meta or #meta < TAIL or meta:sub(1, 2) ~= '\151\207' then return nil end -- an array of 7, u64
  return struct_unpack('>I8', meta, UPDATED_AT), meta:sub(TAIL)
end

local function save_or_append(operation, exists, stored_turns, stored_meta)
  if write_refusal then return write_refusal end
  local appends, time, meta, refusal = operation.kind == 'a', now, written_metas[operation.id], nil
  if meta == nil then meta = stored_meta end
  local updated_before, tail = parse_meta(meta)
  if not appends then
    refusal = parse_save(operation)
    if refusal then return refusal end
    time, tail = time_of(operation.save.updated_at_ms), operation.save.tail
    if time.ms > now.ms then time = now end
  end
  if updated_before and updated_before > time.ms and (appends or operation.keeps_time) then
    time = time_of(string.format('%.0f', updated_before))
  end
  if not updated_before and (operation.mode == 'push' or operation.mode == 'edit') then return {'CORRUPT', 'meta'} end
  if not exists then
    refusal = error_refusal(redis.pcall('ZCARD', deleted_key), 'LAYOUT', 'deleted')
    if refusal then return refusal end
  end
  refusal = check_turns(operation)
  if refusal then return refusal end
  local length, pushed
  refusal, length, pushed = push_turns(operation, stored_turns)
  if refusal then return refusal end
  local revision = string.format('%d', partition.revision + 1)
  refusal = add_to_indexes(operation.id, time, revision, updated_before)
  if refusal then return undo_push(operation, pushed, refusal) end

  partition.revision = partition.revision + 1
  if operation.mode ~= 'push' then length = rewrite_turns(operation, length) end
  length = call_in_batches('RPUSH', operation.turns_key, operation.first, operation.last) or length
  length = string.format('%d', length)
  if appends then
    redis.call('HSET', operation.session_key, '.revision', revision, '.op', operation.op, '.turns', length,
      'updated_at_ms', '\207' .. time.u64)
  else
    write_sections(operation, revision, length)
  end
  if not exists then
    redis.call('ZREM', deleted_key, operation.id)
    redis.call('HDEL', deleted_meta_key, operation.id)
  end
  return applied(operation, time, length, tail)
end

-- The refusal if a condition of the operation is not met.
local function check_conditions(operation, revision, op)
  local refusal = operation.barred and not_callable('HGET') -- which `bar` calls, when it is too late to refuse
  if refusal then return refusal end
  if operation.fencing_token then
    local held = redis.pcall('HGET', operation.lease_key, 'token')
    refusal = error_refusal(held, 'LAYOUT', 'lease') or held ~= operation.fencing_token and {'LEASELOST'}
    if refusal then return refusal end
  end
  local expected, expected_op = operation.expected, operation.expected_op
  if expected and tonumber(expected) ~= (revision or 0) or expected_op and op ~= expected_op then
    return {'CONFLICT', revision or 0}
  end
  if not revision and not operation.foreign and operation.kind ~= 's' then return {'NOTFOUND'} end
end

for i = 1, n do
  local operation = operations[i]
  local deletes, revision, version, turns, op = operation.kind == 'd', nil, nil, nil, nil
  if deletes then -- else what is pending would be written after it
    flush()
    updated, changes, packed_metas, messages = {}, {}, {}, {} -- written: the last `flush` is not to repeat it
  end
  local item = partition.revision < operation.high_water_mark and {'RESET', partition.revision}
    or earlier_answer(operation)
  if not item then item, revision, version, turns, op = read_session(operation) end
  item = item or check_conditions(operation, revision, op)
  if not item and deletes then item = delete(operation) end
  if not item and revision and version ~= ARGV[2] then item = {'VERSION', version or ''} end
  items[i] = item or save_or_append(operation, revision, turns or -1, metas[i])
end
flush()
return items
