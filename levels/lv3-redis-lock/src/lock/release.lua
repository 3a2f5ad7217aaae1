-- Gives the lock back once, if it is still this owner's, and wakes whoever waits for it when that was the last time.
--   KEYS[1] the lock    ARGV[1] the owner    ARGV[2] the channel of its releases
-- Answers how often the owner still holds it, or -1 for somebody who is not the owner.
if redis.call('hexists', KEYS[1], ARGV[1]) == 0 then
    return -1
end
local holds = redis.call('hincrby', KEYS[1], ARGV[1], -1)
if holds > 0 then
    return holds
end
redis.call('del', KEYS[1])
redis.call('publish', ARGV[2], 'released')
return 0
