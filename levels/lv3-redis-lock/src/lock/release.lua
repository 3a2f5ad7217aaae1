-- Gives one hold of the lock back, if it still is one, and wakes whoever waits for the lock when that was the last.
--   KEYS[1] the lock    ARGV[1] the hold    ARGV[2] the channel of its releases
-- Answers how often the owner still holds it, or -1 for a hold that was lost.
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
