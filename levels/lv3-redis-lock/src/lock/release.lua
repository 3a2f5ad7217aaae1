-- Releases one acquisition, if the lock still counts it. Frees the lock after the last one and notifies its waiters.
--   KEYS[1] the lock    ARGV[1] the acquisition id    ARGV[2] the channel of its releases
-- Returns the remaining hold count, or -1 for an acquisition that was lost.
if redis.call('hdel', KEYS[1], ARGV[1]) == 0 then
    return -1
end
local holds = redis.call('hlen', KEYS[1]) - 1
if holds > 0 then
    return holds
end
redis.call('del', KEYS[1])
redis.call('publish', ARGV[2], 'released')
return 0
