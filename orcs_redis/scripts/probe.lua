-- Which commands can't be called: the scripts check what they need by themselves, this says it when a store opens.
--
-- KEYS  1 {p}:state  2 {p}:changes, which with the incarnation is a channel too
--
-- ARGV  1 the channel's name
--       2.. commands
--
-- Reply: an array: "DENIED" (to this user) or "MISSING" (renamed or unknown), command, ...

local function check(command)
  if command == 'PUBLISH' then return redis.acl_check_cmd(command, ARGV[1], '') end
  -- Without the number of their keys the server would read beyond the arguments, and crash.
  if string.sub(command, 1, 4) == 'EVAL' then return redis.acl_check_cmd(command, '', '0') end
  return redis.acl_check_cmd(command)
end

local reply = {}
for i = 2, redis.acl_check_cmd and #ARGV or 0 do -- fakeredis has no rights to check
  local known, allowed = pcall(check, ARGV[i])
  if not known or not allowed then
    reply[#reply + 1], reply[#reply + 2] = known and 'DENIED' or 'MISSING', ARGV[i]
  end
end
return reply
