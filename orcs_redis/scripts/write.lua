-- The only writer of sessions: checks everything, then changes everything, then notifies the peers. One call performs one
-- operation or several of a partition, in their order; each has its own outcome, and what they share is written once.
--
-- KEYS  1 {p}:state        HASH  incarnation, revision (the partition's counter), compacted, forgotten, dedup_bytes,
--                                dedup windows (below)
--       2 {p}:updated      ZSET  id by updated_at_ms
--       3 {p}:meta         HASH  id to packed metadata (below)
--       4 {p}:changes      ZSET  id by the revision of its last change
--       5 {p}:deleted      ZSET  id by the revision of its deletion: the tombstones
--       6 {p}:deleted:meta HASH  id to u64 time of deletion in ms, origin (8 bytes)
--     then for each operation
--       . {p}:session:<id> HASH  one msgpack field per section; .revision, .turns (their number), .op
--       . {p}:turns:<id>   LIST  one msgpack value per turn
--       . {p}:lease:<id>   HASH  (with a lease only) token and more: see lease.lua
--       . {p}:staging:<op> LIST  (mode "staged" only) the turns that are to replace the history
--
-- ARGV  1 incarnation of the namespace, from its descriptor
--       2 version of the session schema, msgpack
--     then for each operation, of which there are 1,000 at most
--      +0 its head, bytes:
--          1 u32: how many of the following arguments are this operation's
--          5 u8: how many keys are
--          6 operation id, 20 bytes: origin (8, of the store), epoch (4), counter (u32, grows by one from one operation
--            of an epoch to the next), nonce (4)
--         26 seen, u64: a revision of this partition that the writer knew before it first sent this operation
--         34 low-water mark, u32: the lowest counter of the epoch's operations that are not finished
--         38 "a" append, "s" save, "d" delete; after it letters for what follows, in this order:
--            "r" and "l" for the next two arguments, "b" for the third; "k": the time of the index never goes back
--       . r: the revision that is to be overwritten; 0: the session must be absent. After a colon may follow the
--         operation id that made it: after a restore a revision may be given anew
--       . l: fencing token of the lease under which to write
--       . b: what is barred, 12 bytes each: epoch (of the same origin), counter and nonce of an operation that was given up
--         without an answer; counter 0xffffffff: an epoch all of whose operations are finished
--       append: the turns. save:
--       . updated_at_ms, decimal (an append takes the server's now, but never goes backwards)
--       . tail of the packed metadata (an append leaves it as it is)
--       . mode of the history: "push" turns; "replace" it by turns; "staged": rename the staging key; "edit" it
--       . number of pairs of section and value, then the pairs
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
--   "EMPTY", part                    a turn or section of no bytes
--   "FORGOTTEN", revision            an earlier sending of this one may have been applied, and forgotten
--   "DENIED", command                the user may not call it
--   "MISSING", command               the server has no such command, or it was renamed
--   "RESET", revision                another incarnation (revision -1), or revisions went back
--   "LAYOUT", part                   a partition's key has a foreign type
-- For every item but "OK" nothing was written. An error in place of the array that was raised while the script ran leaves
-- it open what was.
--
-- Packed metadata: msgpack array [revision u64, updated_at_ms u64, turns u32, origin bin 8, created_at_ms, name,
-- root_path], of which the first four have fixed widths (34 bytes with the array's head) and the rest is the tail. The
-- origin is the store that wrote last, the first 8 bytes of its operation ids. updated_at_ms is at most the server's now.
-- .op: the id of the operation that made the revision.
-- Dedup window, a field of the state: "w", origin and epoch. It holds u32 low-water mark, u32 the highest counter so far,
-- u64 `forgotten` when it was made; then 16 bytes for each of the epoch's operations that were applied, in order: u32
-- counter, nonce, u64 revision; and for each that was barred: instead of its own, the partition's revision then, with
-- the first byte 0x80. Those at the front that are below the mark go, but for the last. What is neither in the window nor
-- below its mark was not applied, unless it may have been in an earlier window: then `seen` is below the third number. A
-- window that is dropped leaves its last revision in `forgotten`.
-- Message, on the channel {p}:changes:<incarnation>: msgpack array [revision u64, updated_at_ms u64, kind (0 saved,
-- 1 deleted), origin bin 8, id].

local WRITERS = 10000        -- windows per partition; beyond them one of those goes that were not used for long
local DEDUP_BYTES = 4194304 -- of all windows of a partition; the same
local TOMBSTONES = 10000     -- per partition
local CLOSED = 4294967295    -- low-water mark of an epoch of which nothing is to come
local BARRED = 128           -- first byte of the revision of what was not applied and is not to be

local lua_pcall, may = pcall, redis.acl_check_cmd -- fakeredis has no rights to check
local call, pcall, sub, byte = redis.call, redis.pcall, string.sub, string.byte
local find, format = string.find, string.format

local pack, number -- of '>I4' and '>I8'
if struct then -- Redis and Valkey have it, fakeredis has not
  pack, number = struct.pack, struct.unpack
else
  function pack(width, n)
    local bytes = ''
    for _ = 1, tonumber(sub(width, 3)) do
      bytes, n = string.char(n % 256) .. bytes, math.floor(n / 256)
    end
    return bytes
  end
  function number(width, bytes, at)
    local n = 0
    for i = at or 1, (at or 1) + sub(width, 3) - 1 do n = n * 256 + byte(bytes, i) end
    return n
  end
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

-- The answer if a command can't be called, else false. It is tried with arguments, without which Valkey crashes.
local rights = {}
local function lacks(command)
  local answer = rights[command]
  if answer == nil then
    answer = false
    if may then
      local known, allowed
      if command == 'RENAME' then
        known, allowed = lua_pcall(may, command, KEYS[1], KEYS[1])
      elseif command == 'UNLINK' then
        known, allowed = lua_pcall(may, command, KEYS[1])
      else
        known, allowed = lua_pcall(may, command, KEYS[1], '0', '0')
      end
      answer = not known and {'MISSING', command} or not allowed and {'DENIED', command}
    end
    rights[command] = answer
  end
  return answer
end

-- The operations, and what is the same for all.

local heads, keys, ids, replies = {}, {}, {}, {} -- where their arguments and keys begin
local windows, writers = {}, {} -- in order, and by origin and epoch; that of each operation
local fields = {'incarnation', 'revision', 'compacted', 'forgotten'}
local argument, key, name = 3, 7, #KEYS[3] + 5 -- an id is as far into {p}:session:<id>
while ARGV[argument] do
  local head, n = ARGV[argument], #ids + 1
  heads[n], keys[n], ids[n] = argument, key, sub(KEYS[key], name)
  argument, key = argument + 1 + number('>I4', head), key + byte(head, 5)
  local writer = sub(head, 6, 17)
  local window = windows[writer]
  if not window then
    window = {known = false, floor = 0, highest = 0, size = 0, added = {}, name = 'w' .. writer}
    windows[writer], windows[#windows + 1], fields[#fields + 1] = window, window, window.name
  end
  writers[n] = window
end
heads[#heads + 1] = argument
if #ids > 1000 then return redis.error_reply('ERR too many operations in one call') end

local function everyone(reply)
  for n = 1, #ids do replies[n] = reply end
  return replies
end

local state = pcall('HMGET', KEYS[1], unpack(fields))
if failed(state) then return everyone(refused(state, 'LAYOUT', 'state')) end
if state[1] ~= ARGV[1] then return everyone({'RESET', -1}) end
local written, compacted, forgotten = natural(state[2]), natural(state[3]), natural(state[4])
if not (written and compacted and forgotten) then return everyone({'LAYOUT', 'state'}) end
for i, window in ipairs(windows) do
  local packed = state[4 + i]
  if packed then
    if #packed < 32 or #packed % 16 ~= 0 then return everyone({'LAYOUT', 'state'}) end
    window.known, window.packed, window.size = true, packed, #packed
    window.floor, window.highest = number('>I4', packed), number('>I4', packed, 5)
  end
end
local metas, known = pcall('HMGET', KEYS[3], unpack(ids)), {} -- packed metadata; by id what was written since

local now, now64, now_text
local function clock() -- the answer if it can't be read
  local time = pcall('TIME')
  if failed(time) then return lacks('TIME') or time end
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  now64, now_text = pack('>I8', now), format('%.0f', now)
end

local function message(revision64, updated64, kind, origin, id)
  return '\149\207' .. revision64 .. '\207' .. updated64 .. kind .. '\196\8' .. origin .. '\217'
    .. string.char(#id) .. id
end

-- The answer to an operation that was applied before, or may have been.
local function repeated(window, head, counter, seen)
  if not window.known then return forgotten > seen and {'FORGOTTEN', written} end
  if counter < window.floor then return {'FORGOTTEN', written} end -- a late sending: its writer has gone on
  if counter <= window.highest then
    local packed, bytes = (window.packed or '................') .. table.concat(window.added), sub(head, 18, 25)
    local at = find(packed, bytes, 17, true)
    while at and at % 16 ~= 1 do at = find(packed, bytes, at + 1, true) end
    if at and byte(packed, at + 8) == BARRED then return {'FORGOTTEN', written} end
    if at then return {'OK', (number('>I8', packed, at + 8)), 0} end
  end
  return (window.packed and number('>I8', window.packed, 9) or forgotten) > seen and {'FORGOTTEN', written}
end

local function remember(window, head, counter, revision64)
  local floor = number('>I4', head, 34)
  window.known, window.added[#window.added + 1] = true, sub(head, 18, 25) .. revision64
  if counter > window.highest then window.highest = counter end
  if floor > window.floor then window.floor = floor end
end

local function packed_window(window)
  local born64 = window.packed and sub(window.packed, 9, 16) or pack('>I8', forgotten)
  local entries = (window.packed and sub(window.packed, 17) or '') .. table.concat(window.added)
  local from = 1
  while from + 16 < #entries and number('>I4', entries, from) < window.floor do from = from + 16 end
  return pack('>I4', window.floor) .. pack('>I4', window.highest) .. born64 .. sub(entries, from)
end

-- Like Redis evicts: of some at random the one that was used least lately; of long ones, if bytes are too many.
local function drop_windows(bytes)
  for _ = 1, 20 do
    local count, long = pcall('HLEN', KEYS[1]), bytes > DEDUP_BYTES
    local many = not failed(count) and count > 5 + WRITERS -- beside the state's own fields
    if failed(count) or not (many or long) then return end
    local some = pcall('HRANDFIELD', KEYS[1], 20, 'WITHVALUES')
    if failed(some) or lacks('HDEL') then return end
    local oldest, last, size
    for i = 1, #some, 2 do
      local length = #some[i] == 13 and sub(some[i], 1, 1) == 'w' and #some[i + 1]
      if length and (many or length > 64) then
        local revision = number('>I8', '\0' .. sub(some[i + 1], length - 6))
        if not last or revision < last then oldest, last, size = some[i], revision, length end
      end
    end
    if oldest then
      forgotten, bytes = math.max(forgotten, last), bytes - size
      call('HSET', KEYS[1], 'forgotten', format('%d', forgotten), 'dedup_bytes', format('%d', bytes))
      call('HDEL', KEYS[1], oldest)
      local window = windows[sub(oldest, 2)]
      if window then window.size = 0 end
    end
  end
end

-- What the operations since the last `flush` share. Only the first of a call goes into the indices at once, see `put`.
local indexed, times, changes, packed, messages = false, {}, {}, {}, {}
local channel = KEYS[4] .. ':' .. ARGV[1]

-- Of an epoch that is closed, and of an operation that was given up, nothing is applied any more, however late it arrives.
local function bar(origin, barred)
  for i = 1, #barred, 12 do
    local writer, id, counter = origin .. sub(barred, i, i + 3), sub(barred, i + 4, i + 11), number('>I4', barred, i + 4)
    local window = windows[writer]
    if not window then
      local old = pcall('HGET', KEYS[1], 'w' .. writer)
      if failed(old) or old and #old < 32 then old = nil end
      window = {
        known = true, floor = old and number('>I4', old) or 0, highest = old and number('>I4', old, 5) or 0,
        size = old and #old or 0, packed = old or nil, added = {}, name = 'w' .. writer,
      }
      windows[writer], windows[#windows + 1] = window, window
    end
    if counter >= window.floor and window.floor < CLOSED then
      window.known = true
      if counter == CLOSED then window.floor = CLOSED elseif counter > window.highest then window.highest = counter end
      -- What was begun before has seen less.
      window.added[#window.added + 1] = id .. string.char(BARRED) .. sub(pack('>I8', written), 2)
    end
  end
end

local function flush()
  if #messages == 0 then return end
  if #times > 0 then
    call('ZADD', KEYS[2], unpack(times))
    call('ZADD', KEYS[4], unpack(changes))
  end
  if #packed > 0 then call('HSET', KEYS[3], unpack(packed)) end
  local values, grown = {'revision', format('%d', written)}, 0
  for _, window in ipairs(windows) do
    if #window.added > 0 then
      window.packed, window.added = packed_window(window), {}
      grown, window.size = grown + #window.packed - window.size, #window.packed
      values[#values + 1], values[#values + 2] = window.name, window.packed
    end
  end
  local new, bytes = call('HSET', KEYS[1], unpack(values)), nil
  if grown ~= 0 or new > 0 then bytes = pcall('HINCRBY', KEYS[1], 'dedup_bytes', grown) end
  if bytes and not failed(bytes) and (new > 0 or bytes > DEDUP_BYTES) then drop_windows(bytes) end
  for _, text in ipairs(messages) do pcall('PUBLISH', channel, text) end
  times, changes, packed, messages = {}, {}, {}, {}
end

-- The session as it is stored; or nil and the answer.
local function read(id, kind, session)
  local stored = pcall('HMGET', session, '.revision', 'version', '.turns', '.op')
  local foreign = failed(stored)
  if foreign then
    local answer = refused(stored, 'CORRUPT', 'session')
    if kind ~= 'd' or answer.err then return nil, answer end
    stored = {}
  end
  local current = natural(stored[1])
  if not current and not foreign then
    local there = pcall('EXISTS', session)
    if failed(there) then return nil, there end
    if there == 1 then
      if kind ~= 'd' then return nil, {'CORRUPT', '.revision'} end
      foreign = true
    else
      local tombstone = pcall('HGET', KEYS[6], id)
      if failed(tombstone) then return nil, refused(tombstone, 'LAYOUT', 'deleted:meta') end
      local change = not tombstone and pcall('ZSCORE', KEYS[4], id)
      if failed(change) then return nil, refused(change, 'LAYOUT', 'changes') end
      if change then -- no tombstone, and yet it was there: its hash was evicted
        if kind == 'a' then return nil, {'CORRUPT', 'session'} end
        foreign = kind == 'd'
      end
    end
  end
  return {
    exists = current and true or false, foreign = foreign, current = current or 0, version = stored[2],
    turns = tonumber(stored[3]) or -1, op = stored[4],
  }
end

local function delete(op, id, session, turns)
  for i, part in ipairs({'updated', 'meta', 'changes', 'deleted', 'deleted:meta'}) do
    local look = (i == 2 or i == 5) and {'HGET', KEYS[1 + i], id} or {'ZCARD', KEYS[1 + i]}
    local reply = pcall(unpack(look))
    if failed(reply) then return refused(reply, 'LAYOUT', part) end
  end
  local lack = lacks('UNLINK') or lacks('ZREM') or lacks('HDEL') or lacks('ZADD') or lacks('HSET') or lacks('ZRANGE')
  if lack then return lack end
  local unclear = not now and clock()
  if unclear then return unclear end
  local gone = pcall('UNLINK', session, turns) -- the first write: a replica refuses it
  if failed(gone) then return gone end
  written = written + 1
  local revision, revision64, origin = format('%d', written), pack('>I8', written), sub(op, 1, 8)
  call('ZREM', KEYS[2], id)
  call('HDEL', KEYS[3], id)
  call('ZADD', KEYS[4], revision, id)
  call('ZADD', KEYS[5], revision, id)
  call('HSET', KEYS[6], id, now64 .. origin)
  if call('ZCARD', KEYS[5]) > TOMBSTONES then
    local oldest = call('ZRANGE', KEYS[5], 0, 0, 'WITHSCORES')
    call('ZREM', KEYS[5], oldest[1])
    call('ZREM', KEYS[4], oldest[1])
    call('HDEL', KEYS[6], oldest[1])
    call('HSET', KEYS[1], 'compacted', oldest[2])
    compacted = tonumber(oldest[2])
  end
  known[id] = false
  messages[#messages + 1] = message(revision64, now64, '\1', origin, id)
  return {'OK', written, now}, revision64
end

-- The answer, after the turns that were pushed are gone again.
local function taken_back(turns, pushed, answer)
  if pushed == 0 or not failed(pcall('LTRIM', turns, 0, -1 - pushed)) then return answer end
  return redis.error_reply('ERR stopped in user_script: turns could not be taken back') -- the outcome is open
end

-- A save or an append. Its own arguments are from `from` to `stop`.
local function put(s, op, id, appending, keeps, session, turns, staging, from, stop, meta)
  if s.exists and s.version ~= ARGV[2] then return {'VERSION', s.version or ''} end
  if failed(metas) then return refused(metas, 'LAYOUT', 'meta') end
  local lack
  if not now then -- the first of the call
    lack = lacks('HSET') or clock()
    if lack then return lack end
  end
  local mode, was, tail = 'push', nil, nil -- was: when it was updated
  local sound = meta and #meta >= 35 and sub(meta, 1, 2) == '\151\207'
  if sound then was, tail = number('>I8', meta, 12), sub(meta, 35) end

  local updated, updated64, updated_text, sections, removed, removals = now, now64, now_text, nil, nil, nil
  if appending then
    keeps = true
  else
    updated, tail, mode, sections = tonumber(ARGV[from]), ARGV[from + 1], ARGV[from + 2], from + 4
    if updated < now then updated64, updated_text = pack('>I8', updated), ARGV[from] else updated = now end
    removed = sections + 2 * ARGV[from + 3] + 1
    removals = tonumber(ARGV[removed - 1])
    from = removed + removals
    for i = sections + 1, removed - 2, 2 do
      if ARGV[i] == '' then return {'EMPTY', ARGV[i - 1]} end
    end
    lack = lacks('ZREM') or lacks('HDEL')
      or mode == 'replace' and (lacks('UNLINK') or lacks('RPUSH'))
      or mode == 'staged' and (lacks('RENAME') or lacks('PERSIST'))
      or mode == 'edit' and (lacks('LTRIM') or lacks('LSET') or lacks('RPUSH'))
    if lack then return lack end
  end
  if keeps and was and was > updated then
    updated, updated64, updated_text = was, sub(meta, 12, 19), format('%.0f', was)
  end
  if not sound and (mode == 'push' or mode == 'edit') then return {'CORRUPT', 'meta'} end
  if not s.exists then
    local tombstones = pcall('ZCARD', KEYS[5])
    if failed(tombstones) then return refused(tombstones, 'LAYOUT', 'deleted') end
  end
  local edits, kept, pairs_end
  if mode == 'edit' then
    kept, edits = ARGV[from + 1] - ARGV[from] + 1, from + 3
    pairs_end = edits + 2 * ARGV[from + 2]
    for i = edits, pairs_end - 2, 2 do
      if ARGV[i + 1] == '' then return {'EMPTY', 'turn'} end
      if not (ARGV[i] - kept < 0) then return {'CORRUPT', 'history.turns'} end
    end
  end
  if mode ~= 'staged' then
    for i = pairs_end or from, stop do
      if ARGV[i] == '' then return {'EMPTY', 'turn'} end
    end
  end

  -- What is pushed is pushed at once: the list's own answer tells whether it is what it should be.
  local length, pushed = nil, 0
  if mode == 'push' and from <= stop then
    pushed = math.min(stop - from + 1, 4000)
    length = pcall('RPUSH', turns, unpack(ARGV, from, from + pushed - 1))
    from = from + pushed
  else
    length = pcall('LLEN', turns)
  end
  if failed(length) then return pushed > 0 and lacks('RPUSH') or refused(length, 'CORRUPT', 'history.turns') end
  if (mode == 'push' or mode == 'edit') and length ~= s.turns + pushed or mode == 'edit' and ARGV[from + 1] - length >= 0 then
    return taken_back(turns, pushed, {'CORRUPT', 'history.turns'})
  end
  if mode == 'staged' then
    local ready = pcall('LLEN', staging)
    if failed(ready) then return ready end
    if ready ~= tonumber(ARGV[from]) then return {'STAGING'} end
  end

  -- The first write of a call is one that a full server refuses; that of a foreign index is undone.
  local revision = format('%d', written + 1)
  if indexed then
    local n = #times
    times[n + 1], times[n + 2], changes[n + 1], changes[n + 2] = updated_text, id, revision, id
  else
    local part, reply = 'updated', pcall('ZADD', KEYS[2], updated_text, id)
    if not failed(reply) then
      part, reply = 'changes', pcall('ZADD', KEYS[4], revision, id)
      if failed(reply) then
        if was then call('ZADD', KEYS[2], format('%.0f', was), id) else call('ZREM', KEYS[2], id) end
      end
    end
    if failed(reply) then
      return taken_back(turns, pushed, lacks('ZADD') or refused(reply, 'LAYOUT', part))
    end
    indexed = true
  end

  written = written + 1
  local revision64, origin = pack('>I8', written), sub(op, 1, 8)
  if mode == 'replace' then
    call('UNLINK', turns)
    length = 0
  elseif mode == 'staged' then
    call('RENAME', staging, turns)
    call('PERSIST', turns)
    length, from = tonumber(ARGV[from]), stop + 1
  elseif mode == 'edit' then
    length = kept
    call('LTRIM', turns, ARGV[from], ARGV[from + 1])
    for i = edits, pairs_end - 2, 2 do call('LSET', turns, ARGV[i], ARGV[i + 1]) end
    from = pairs_end
  end
  for i = from, stop, 4000 do length = call('RPUSH', turns, unpack(ARGV, i, math.min(i + 3999, stop))) end

  -- Revisions and the like as text: Redis takes long over a number that a script passes.
  length = format('%d', length)
  if appending then
    call('HSET', session, '.revision', revision, '.op', op, '.turns', length, 'updated_at_ms', '\207' .. updated64)
  else
    local last = math.min(sections + 3999, removed - 2)
    call('HSET', session, '.revision', revision, '.op', op, '.turns', length, unpack(ARGV, sections, last))
    for i = last + 1, removed - 2, 4000 do
      call('HSET', session, unpack(ARGV, i, math.min(i + 3999, removed - 2)))
    end
    for i = removed, removed + removals - 1, 4000 do
      call('HDEL', session, unpack(ARGV, i, math.min(i + 3999, removed + removals - 1)))
    end
  end
  if not s.exists then
    call('ZREM', KEYS[5], id)
    call('HDEL', KEYS[6], id)
  end

  meta = '\151\207' .. revision64 .. '\207' .. updated64 .. '\206' .. pack('>I4', length) .. '\196\8' .. origin .. tail
  local n = #packed
  packed[n + 1], packed[n + 2], known[id] = id, meta, meta
  messages[#messages + 1] = message(revision64, updated64, '\0', origin, id)
  return {'OK', written, updated}, revision64
end

for n, id in ipairs(ids) do
  local start, where = heads[n], keys[n]
  local head, from, stop = ARGV[start], start + 1, heads[n + 1] - 1
  local op, counter, seen, kind = sub(head, 6, 25), number('>I4', head, 18), number('>I8', head, 26), sub(head, 38, 38)
  local session, turns, expected, maker, lease, token, barred = KEYS[where], KEYS[where + 1], nil, nil, nil, nil, nil
  if #head > 38 then
    if find(head, 'r', 39, true) then
      expected, from = ARGV[from], from + 1
      if sub(expected, -21, -21) == ':' then expected, maker = sub(expected, 1, -22), sub(expected, -20) end
    end
    if find(head, 'l', 39, true) then
      token, lease, from = ARGV[from], KEYS[where + 2], from + 1
    end
    if find(head, 'b', 39, true) then
      barred, from = ARGV[from], from + 1
    end
  end

  local window, s, answer, revision64 = writers[n], nil, nil, nil
  if kind == 'd' then flush() end
  answer = written < seen and {'RESET', written} or repeated(window, head, counter, seen)
  if not answer then s, answer = read(id, kind, session) end
  if not answer then
    local held = token and pcall('HGET', lease, 'token')
    answer = barred and lacks('HGET') or nil -- which `bar` calls, when it is too late to refuse
    if answer then
      -- nothing was written
    elseif failed(held) then
      answer = refused(held, 'LAYOUT', 'lease')
    elseif held ~= token then
      answer = {'LEASELOST'}
    elseif expected and tonumber(expected) ~= s.current or maker and s.op ~= maker then
      answer = {'CONFLICT', s.current}
    elseif not s.exists and not s.foreign and kind ~= 's' then
      answer = {'NOTFOUND'}
    elseif kind == 'd' then
      answer, revision64 = delete(op, id, session, turns)
    else
      local meta = known[id]
      if meta == nil then meta = metas[n] end
      local staging, keeps = KEYS[where + byte(head, 5) - 1], #head > 38 and find(head, 'k', 39, true)
      answer, revision64 = put(s, op, id, kind == 'a', keeps, session, turns, staging, from, stop, meta)
    end
    if revision64 then
      remember(window, head, counter, revision64)
      if barred then bar(sub(op, 1, 8), barred) end
    end
  end
  replies[n] = answer
end
flush()
return replies
