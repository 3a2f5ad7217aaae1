-- Releases one acquisition, if the lock still counts it. Frees the lock after the last one and notifies its waiters.
--   KEYS[1] the lock    ARGV[1] the acquisition id    ARGV[2] the channel of its releases
-- Returns the remaining hold count, -1 for an acquisition that was lost, or -2 if the lock is free and its waiters could
-- not be notified.
if redis.call('hdel', KEYS[1], ARGV[1]) == 0 then
    return -1
end
local holds = redis.call('hlen', KEYS[1]) - 1
if holds > 0 then
    return holds
end
redis.call('del', KEYS[1])
-- `pcall`: this user may lack the channel. The lock is free all the same, and an error here would deny it.
local notified = redis.pcall('publish', ARGV[2], 'released')
if type(notified) == 'table' then
    return -2
end
return 0
