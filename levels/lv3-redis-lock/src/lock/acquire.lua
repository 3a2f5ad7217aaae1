-- Acquires the lock, or returns the remaining TTL of its current lease.
--   KEYS[1] the lock    ARGV[1] the owner    ARGV[2] the lease in milliseconds    ARGV[3] the acquisition id
-- The lock is a hash: `owner`, and a field for each acquisition. So a repeated acquire or release counts once.
-- Returns {1, hold count, 0} or {0, TTL in milliseconds, 0}.
if redis.call('hget', KEYS[1], 'owner') ~= ARGV[1] and redis.call('exists', KEYS[1]) == 1 then
    return { 0, redis.call('pttl', KEYS[1]), 0 }
end
redis.call('hset', KEYS[1], 'owner', ARGV[1], ARGV[3], 1)
redis.call('pexpire', KEYS[1], ARGV[2])
return { 1, redis.call('hlen', KEYS[1]) - 1, 0 }
