-- Which commands can't be called: the scripts check what they need by themselves, this says it when a store opens.
--
-- KEYS  1 {p}:state  2 {p}:changes, which with the incarnation is a channel too
--
-- ARGV  1 the channel's name
--       2.. commands
--
-- Reply: an array: "DENIED" (to this user) or "MISSING" (renamed or unknown), command, ...

-- With arguments, without which Valkey crashes.
local function check(command)
  local may = redis.acl_check_cmd
  if command == 'PUBLISH' then return may(command, ARGV[1], '') end
  if command == 'SUBSCRIBE' or command == 'UNSUBSCRIBE' then return may(command, ARGV[1]) end
  if command == 'RENAME' or command == 'COPY' or command == 'LMOVE' then return may(command, KEYS[1], KEYS[1]) end
  if command == 'UNLINK' or command == 'EXISTS' then return may(command, KEYS[1]) end
  return may(command, KEYS[1], '0', '0')
end

local reply = {}
for i = 2, redis.acl_check_cmd and #ARGV or 0 do -- fakeredis has no rights to check
  local known, allowed = pcall(check, ARGV[i])
  if not known or not allowed then
    reply[#reply + 1], reply[#reply + 2] = known and 'DENIED' or 'MISSING', ARGV[i]
  end
end
return reply
