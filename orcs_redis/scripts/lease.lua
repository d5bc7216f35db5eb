-- Takes, keeps or gives back the right to a session for some time.
--
-- KEYS  1 {p}:state       HASH    incarnation
--       2 {p}:lease:<id>  HASH    token, claim, holder, since (ms); it expires with the lease
--       3 {p}:fence       STRING  the last fencing token of the partition
--       4 {p}:leases      ZSET    id by the time (ms) its lease ends at; also the channel that tells of releases
--
-- ARGV  1 incarnation of the namespace
--       2 kind: "acquire", "renew" or "release"
--       3 session id; it need not exist
--       4 acquire: an id of this claim, 12 bytes, so that a repetition is recognised. Else the token
--       5 acquire, renew: for how many ms from now
--       6 acquire: who holds it, for people
--
-- Reply, an array:
--   "OK", token          it is held (release: no more), for the time given from now on
--   "HELD", ms           acquire: another claim holds it, for so long unless renewed
--   "LEASELOST"          renew, release: this token holds it no more
--   "RESET", -1          another incarnation
--
-- Message: the session id, when its lease was released.

local kind, id, mine, ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return {'RESET', -1} end
local held = redis.call('HMGET', KEYS[2], 'token', 'claim')
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

if kind == 'acquire' and held[2] ~= mine then
  if held[1] then return {'HELD', redis.call('PTTL', KEYS[2])} end
  held[1] = string.format('%.0f', redis.call('INCR', KEYS[3]))
  redis.call('HSET', KEYS[2], 'token', held[1], 'claim', mine, 'holder', ARGV[6], 'since', now)
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now)
elseif kind ~= 'acquire' and held[1] ~= mine then
  return {'LEASELOST'}
end
if kind == 'release' then
  redis.call('UNLINK', KEYS[2])
  redis.call('ZREM', KEYS[4], id)
  redis.call('PUBLISH', KEYS[4], id)
else
  redis.call('PEXPIRE', KEYS[2], ttl)
  redis.call('ZADD', KEYS[4], now + tonumber(ttl), id)
end
return {'OK', tonumber(held[1])}
