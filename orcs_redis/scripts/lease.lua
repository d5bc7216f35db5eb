-- Claims, renews or releases the right to a session for some time.
--
-- KEYS  1 {p}:state       HASH    incarnation, revision, forgotten, dedup_bytes, dedup windows (see write.lua)
--       2 {p}:lease:<id>  HASH    token, claim, holder, since (ms); it expires with the lease
--       3 {p}:fence       STRING  the last fencing token of the partition
--       4 {p}:leases      ZSET    id by the time (ms) its lease ends at
--
-- ARGV  1 incarnation of the namespace
--       2 kind: "acquire", "renew" or "release"
--       3 session id; it need not exist
--       4 renew, release: the token. acquire: the operation id of this claim, the same in each attempt (20 bytes, see
--         write.lua)
--       5 acquire, renew: for how many ms from now
--       6 acquire: who holds it, for people
--       7 acquire: high-water mark, decimal: a revision of the partition that was known before the first attempt
--       8 acquire: low-water mark, decimal: the lowest counter of the epoch's operations that are not finished
--
-- Reply, an array:
--   "OK", token          it is held (release: no more), for the time given from now on
--   "HELD", ms           acquire: another claim holds it, for so long unless renewed
--   "LEASELOST"          renew, release: this token holds it no more
--   "FORGOTTEN", revision  acquire: it arrives late; or an earlier attempt was answered, or may have been
--   "DENIED", command    the user may not call it
--   "MISSING", command   the server has no such command, or it was renamed
--   "RESET", revision    another incarnation (revision -1), or revisions went back
--   "LAYOUT", part       a key has a foreign type
-- For every reply but "OK" nobody's lease has changed. An error that was raised while the script ran does not say.
--
-- A claim that was answered is in its dedup window like a write: should it arrive again after the release, nobody would
-- give the lease back.
--
-- Message, on the channel {p}:leases:<incarnation>:<id>: the session id, when its lease was released.

local MAX_WINDOWS = 10000 -- as in write.lua
local STATE_FIELDS = 5    -- beside the windows
local ENTRY = 16          -- bytes of an entry in a dedup window

local state_key, lease_key, fence_key, leases_key = unpack(KEYS)
local kind, id, ttl = ARGV[2], ARGV[3], ARGV[5]
local acquires = kind == 'acquire'

-- As in write.lua.

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

-- A refusal is a reply that says why it was not done. What returns one returns nil or false where there is nothing to
-- refuse.

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

local function load_window(window, packed) -- false: it is none
  if #packed < 2 * ENTRY or #packed % ENTRY ~= 0 then return false end
  local entries_at
  window.low_water_mark, window.highest, window.forgotten_at_birth, entries_at = struct_unpack('>I4I4I8', packed)
  window.exists, window.size, window.entries = true, #packed, packed:sub(entries_at)
  return true
end

-- The revision in an operation's entry, 8 bytes, and where the entry begins; nil if it has none.
local function find_entry(window, identity)
  local entries = window.entries .. table.concat(window.added)
  local at = entries:find(identity, 1, true)
  while at and at % ENTRY ~= 1 do at = entries:find(identity, at + 1, true) end
  return at and entries:sub(at + #identity, at + ENTRY - 1), at
end

-- What is stored of the partition and the lease, and the time.

local window = {
  name = 'w' .. ARGV[4]:sub(1, 12), exists = false, -- of the claim; a token has none
  low_water_mark = 0, highest = 0, forgotten_at_birth = nil, entries = '', added = {}, size = 0,
}
local state = redis.pcall('HMGET', state_key, 'incarnation', 'revision', 'forgotten', window.name)
local refusal = error_refusal(state, 'LAYOUT', 'state')
if refusal then return refusal end
if state[1] ~= ARGV[1] then return {'RESET', -1} end
local partition = {revision = tonumber(state[2]), forgotten = tonumber(state[3])}
if not (partition.revision and partition.forgotten) or acquires and state[4] and not load_window(window, state[4]) then
  return {'LAYOUT', 'state'}
end
local held = redis.pcall('HMGET', lease_key, 'token', 'claim')
refusal = error_refusal(held, 'LAYOUT', 'lease')
if refusal then return refusal end
local clock = redis.pcall('TIME')
if error_refusal(clock) then return not_callable('TIME') or clock end
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

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

-- Enters a claim that is answered in its window.
local function add_entry(identity)
  if not window.exists then
    local count = redis.pcall('HLEN', state_key)
    if error_refusal(count) or count >= STATE_FIELDS + MAX_WINDOWS then return end -- the next write makes room
  end
  window.added[1] = identity .. struct_pack('>I8', partition.revision)
  window.low_water_mark = math.max(window.low_water_mark, tonumber(ARGV[8]))
  window.highest = math.max(window.highest, (struct_unpack('>I4', identity)))
  local packed = pack_window(window)
  redis.pcall('HSET', state_key, window.name, packed)
  redis.pcall('HINCRBY', state_key, 'dedup_bytes', #packed - window.size)
end

-- Whether a claim was answered before, or may have been. It was given back since, or it would be the holder's.
local function answered_before(identity, high_water_mark)
  if not window.exists then return partition.forgotten > high_water_mark end
  return struct_unpack('>I4', identity) < window.low_water_mark or find_entry(window, identity)
    or window.forgotten_at_birth > high_water_mark
end

local function acquire(claim, high_water_mark)
  local identity = claim:sub(13) -- counter and nonce
  if partition.revision < high_water_mark then return {'RESET', partition.revision} end
  if answered_before(identity, high_water_mark) then return {'FORGOTTEN', partition.revision} end
  if held[1] then
    local left = redis.pcall('PTTL', lease_key)
    if error_refusal(left) then return not_callable('PTTL') or left end
    add_entry(identity)
    return {'HELD', left}
  end
  refusal = not_callable('HSET') or not_callable('PEXPIRE') or not_callable('ZADD') or not_callable('ZREMRANGEBYSCORE')
  if refusal then return refusal end
  local last_token = redis.pcall('GET', fence_key)
  refusal = error_refusal(last_token, 'LAYOUT', 'fence')
  if refusal then return not_callable('GET') or refusal end
  last_token = tonumber(last_token or 0)
  if not last_token then return {'LAYOUT', 'fence'} end
  -- At least the time: a restore takes the fence back, and a token of before must not be given again.
  local next_token = math.max(last_token + 1, now)
  local token = string.format('%.0f', next_token)
  local stored = redis.pcall('SET', fence_key, token)
  if error_refusal(stored) then return not_callable('SET') or stored end
  refusal = error_refusal(redis.pcall('ZREMRANGEBYSCORE', leases_key, '-inf', now), 'LAYOUT', 'leases')
  if refusal then return refusal end
  redis.call('ZADD', leases_key, now + tonumber(ttl), id)
  redis.call('HSET', lease_key, 'token', token, 'claim', claim, 'holder', ARGV[6], 'since', now)
  redis.call('PEXPIRE', lease_key, ttl)
  add_entry(identity)
  return {'OK', next_token}
end

local function renew(token)
  refusal = not_callable('PEXPIRE')
  if refusal then return refusal end
  refusal = error_refusal(redis.pcall('ZADD', leases_key, now + tonumber(ttl), id), 'LAYOUT', 'leases')
  if refusal then return not_callable('ZADD') or refusal end
  redis.call('PEXPIRE', lease_key, ttl)
  return {'OK', tonumber(token)}
end

local function release(token)
  refusal = not_callable('UNLINK') or not_callable('ZREM')
    or error_refusal(redis.pcall('ZREM', leases_key, id), 'LAYOUT', 'leases')
  if refusal then return refusal end
  redis.call('UNLINK', lease_key)
  redis.pcall('PUBLISH', leases_key .. ':' .. ARGV[1] .. ':' .. id, id)
  return {'OK', tonumber(token)}
end

if acquires and held[2] ~= ARGV[4] then return acquire(ARGV[4], tonumber(ARGV[7])) end
local token = acquires and held[1] or ARGV[4]
if held[1] ~= token then return {'LEASELOST'} end
if kind == 'release' then return release(token) end
return renew(token) -- or the claim that holds it arrives again
