-- Tries every command that the writer uses on keys of its own, since a script that lacks a right half-way leaves its
-- first half behind. The keys are gone when it returns.
--
-- KEYS  1 {p}:probe:hash  2 {p}:probe:list  3 {p}:probe:zset  4 {p}:probe:renamed
--       5 {p}:changes, as a channel: it is sent one empty message
--
-- Reply: "" if all went well, else the first error's text.

local tries = {
  {'HSET', KEYS[1], 'a', 1}, {'HMGET', KEYS[1], 'a'}, {'HGET', KEYS[1], 'a'}, {'HDEL', KEYS[1], 'b'},
  {'HLEN', KEYS[1]}, {'HRANDFIELD', KEYS[1], 1}, {'ZSCORE', KEYS[3], 'a'},
  {'RPUSH', KEYS[2], 1}, {'LLEN', KEYS[2]}, {'LSET', KEYS[2], 0, 2}, {'LTRIM', KEYS[2], 0, -1},
  {'ZADD', KEYS[3], 1, 'a'}, {'ZCARD', KEYS[3]}, {'ZRANGE', KEYS[3], 0, 0, 'WITHSCORES'}, {'ZREM', KEYS[3], 'b'},
  {'PEXPIRE', KEYS[2], 1000}, {'RENAME', KEYS[2], KEYS[4]}, {'PERSIST', KEYS[4]}, {'EXISTS', KEYS[4]}, {'TIME'},
  {'UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4]}, {'PUBLISH', KEYS[5], ''},
}
local problem = ''
for _, command in ipairs(tries) do
  local reply = redis.pcall(unpack(command))
  if problem == '' and type(reply) == 'table' and reply.err then problem = command[1] .. ': ' .. reply.err end
end
return problem
