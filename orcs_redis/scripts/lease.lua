-- Takes, keeps or gives back the right to a session for some time.
--
-- KEYS  1 {p}:state       HASH    incarnation, revision, forgotten, dedup_bytes, dedup windows (see write.lua)
--       2 {p}:lease:<id>  HASH    token, claim, holder, since (ms); it expires with the lease
--       3 {p}:fence       STRING  the last fencing token of the partition
--       4 {p}:leases      ZSET    id by the time (ms) its lease ends at
--
-- ARGV  1 incarnation of the namespace
--       2 kind: "acquire", "renew" or "release"
--       3 session id; it need not exist
--       4 renew, release: the token. acquire: the operation id of this claim, by which a repetition is recognised (20
--         bytes, see write.lua)
--       5 acquire, renew: for how many ms from now
--       6 acquire: who holds it, for people
--       7 acquire: seen, decimal: a revision of the partition that was known before the first sending
--       8 acquire: low-water mark, decimal: the lowest counter of the epoch's operations that are not finished
--
-- Reply, an array:
--   "OK", token          it is held (release: no more), for the time given from now on
--   "HELD", ms           acquire: another claim holds it, for so long unless renewed
--   "LEASELOST"          renew, release: this token holds it no more
--   "FORGOTTEN", revision  acquire: a late sending; or an earlier one may have been applied, and forgotten
--   "DENIED", command    the user may not call it
--   "MISSING", command   the server has no such command, or it was renamed
--   "RESET", revision    another incarnation (revision -1), or revisions went back
--   "LAYOUT", part       a key has a foreign type
-- For every reply but "OK" nobody's lease has changed. An error that was raised while the script ran leaves it open.
--
-- A claim that was answered is noted in its dedup window like a write: should it arrive again after the release, nobody
-- would give the lease back.
--
-- Message, on the channel {p}:leases:<incarnation>: the session id, when its lease was released.

local WRITERS = 10000 -- as in write.lua
local FIELDS = 5

local kind, id, mine, ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local acquiring = kind == 'acquire'
local lua_pcall, may = pcall, redis.acl_check_cmd -- fakeredis has no rights to check

local number, pack
if struct then
  number, pack = struct.unpack, struct.pack
else
  function number(width, bytes, at)
    local n = 0
    for i = at, at + string.sub(width, 3) - 1 do n = n * 256 + string.byte(bytes, i) end
    return n
  end
  function pack(width, n)
    local bytes = ''
    for _ = 1, tonumber(string.sub(width, 3)) do
      bytes, n = string.char(n % 256) .. bytes, math.floor(n / 256)
    end
    return bytes
  end
end

local function failed(reply) return type(reply) == 'table' and reply.err end

local function refused(reply, part)
  if string.find(tostring(reply.err), 'WRONGTYPE', 1, true) then return {'LAYOUT', part} end
  return reply
end

-- The answer if one of the commands can't be called, else nil. They are tried with arguments, without which Valkey crashes.
local function lacks(...)
  for _, command in ipairs(may and {...} or {}) do
    local known, allowed = lua_pcall(may, command, KEYS[1], command == 'UNLINK' and KEYS[1] or '0')
    if not known then return {'MISSING', command} end
    if not allowed then return {'DENIED', command} end
  end
end

local window = 'w' .. string.sub(mine, 1, 12)
local state = redis.pcall('HMGET', KEYS[1], 'incarnation', 'revision', 'forgotten', window)
if failed(state) then return refused(state, 'state') end
if state[1] ~= ARGV[1] then return {'RESET', -1} end
local revision, forgotten = tonumber(state[2]), tonumber(state[3])
local packed = acquiring and state[4]
if not (revision and forgotten) or packed and #packed < 32 then return {'LAYOUT', 'state'} end
local held = redis.pcall('HMGET', KEYS[2], 'token', 'claim')
if failed(held) then return refused(held, 'lease') end
local clock = redis.pcall('TIME')
if failed(clock) then return lacks('TIME') or clock end
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- Whether this claim was answered before, or may have been; it was given back since, or it would be the holder's.
local function answered()
  local seen = tonumber(ARGV[7])
  if not packed then return forgotten > seen end
  local at = string.find(packed, string.sub(mine, 13, 20), 17, true)
  while at and at % 16 ~= 1 do at = string.find(packed, string.sub(mine, 13, 20), at + 1, true) end
  return at or number('>I4', mine, 13) < number('>I4', packed, 1) or number('>I8', packed, 9) > seen
end

local function note()
  local floor, highest, born, entries = tonumber(ARGV[8]), 0, pack('>I8', forgotten), ''
  if packed then
    floor, highest = math.max(floor, (number('>I4', packed, 1))), number('>I4', packed, 5)
    born, entries = string.sub(packed, 9, 16), string.sub(packed, 17)
  else
    local count = redis.pcall('HLEN', KEYS[1])
    if failed(count) or count >= FIELDS + WRITERS then return end -- the next write makes room
  end
  entries = entries .. string.sub(mine, 13, 20) .. pack('>I8', revision)
  local from = 1
  while from + 16 < #entries and number('>I4', entries, from) < floor do from = from + 16 end
  local new = pack('>I4', floor) .. pack('>I4', math.max(highest, (number('>I4', mine, 13)))) .. born
    .. string.sub(entries, from)
  redis.pcall('HSET', KEYS[1], window, new)
  redis.pcall('HINCRBY', KEYS[1], 'dedup_bytes', #new - (packed and #packed or 0))
end

local token = acquiring and held[1] or mine
if acquiring and held[2] ~= mine then
  if revision < tonumber(ARGV[7]) then return {'RESET', revision} end
  if answered() then return {'FORGOTTEN', revision} end
  if held[1] then
    local left = redis.pcall('PTTL', KEYS[2])
    if failed(left) then return lacks('PTTL') or left end
    note()
    return {'HELD', left}
  end
  local lack = lacks('HSET', 'PEXPIRE', 'ZADD', 'ZREMRANGEBYSCORE')
  if lack then return lack end
  local next = redis.pcall('INCR', KEYS[3])
  if failed(next) then return lacks('INCR') or refused(next, 'fence') end
  local swept = redis.pcall('ZREMRANGEBYSCORE', KEYS[4], '-inf', now)
  if failed(swept) then return refused(swept, 'leases') end
  token = string.format('%.0f', next)
  redis.call('ZADD', KEYS[4], now + tonumber(ttl), id)
  redis.call('HSET', KEYS[2], 'token', token, 'claim', mine, 'holder', ARGV[6], 'since', now)
  redis.call('PEXPIRE', KEYS[2], ttl)
  note()
elseif held[1] ~= token then
  return {'LEASELOST'}
elseif kind == 'release' then
  local lack = lacks('UNLINK', 'ZREM')
  if lack then return lack end
  local gone = redis.pcall('ZREM', KEYS[4], id)
  if failed(gone) then return refused(gone, 'leases') end
  redis.call('UNLINK', KEYS[2])
  redis.pcall('PUBLISH', KEYS[4] .. ':' .. ARGV[1], id)
else
  local lack = lacks('PEXPIRE')
  if lack then return lack end
  local ends = redis.pcall('ZADD', KEYS[4], now + tonumber(ttl), id)
  if failed(ends) then return lacks('ZADD') or refused(ends, 'leases') end
  redis.call('PEXPIRE', KEYS[2], ttl)
end
return {'OK', tonumber(token)}
