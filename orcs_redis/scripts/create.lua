-- Creates a namespace, unless it is there. A store calls it with its first write to a namespace that is absent.
--
-- KEYS  1 <namespace>:layout  HASH  version, partitions, incarnation
--       2.. {p}:state         HASH  incarnation, revision, compacted, forgotten, dedup_bytes: one each
--
-- ARGV  1 version of the layout
--       2 incarnation: an id that no other namespace has had
--
-- Reply, an array: "OK"; "EXISTS": there is one; "STRAY": no descriptor, but a partition's state without it; "DENIED" (to
-- this user) or "MISSING" (renamed or unknown) and a command: nothing was written. The second item of the others is "".
--
-- Message, on the channel {p}:state of the first partition: the incarnation.

for _, command in ipairs(redis.acl_check_cmd and {'EXISTS', 'HSET'} or {}) do -- fakeredis has no rights to check
  local known, allowed = pcall(redis.acl_check_cmd, command, KEYS[1], KEYS[1]) -- without arguments Valkey crashes
  if not known or not allowed then return {known and 'DENIED' or 'MISSING', command} end
end
if redis.call('EXISTS', KEYS[1]) == 1 then return {'EXISTS', ''} end
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then return {'STRAY', ''} end
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'partitions', #KEYS - 1, 'incarnation', ARGV[2])
for i = 2, #KEYS do
  redis.call('HSET', KEYS[i], 'incarnation', ARGV[2], 'revision', 0, 'compacted', 0, 'forgotten', 0, 'dedup_bytes', 0)
end
redis.pcall('PUBLISH', KEYS[2], ARGV[2]) -- who may not publish creates all the same: watches look by themselves too
return {'OK', ''}
