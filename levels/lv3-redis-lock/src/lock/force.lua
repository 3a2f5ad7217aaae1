-- Releases the lock, whoever holds it and however often, and notifies its waiters.
--   KEYS[1] the lock    ARGV[1] the channel of its releases
-- Returns 1, or 0 if the lock was free.
if redis.call('del', KEYS[1]) == 0 then
    return 0
end
-- `pcall`: the lock is free, whether or not this user may publish.
redis.pcall('publish', ARGV[1], 'released')
return 1
