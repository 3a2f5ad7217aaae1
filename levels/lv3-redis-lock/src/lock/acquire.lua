-- Takes the lock, or says how long it will stay taken at most.
--   KEYS[1] the lock    ARGV[1] the owner    ARGV[2] the lease in milliseconds
-- The lock is a hash: owner -> how often it has taken the lock. Answers {1, 0}, or {0, milliseconds}.
if redis.call('exists', KEYS[1]) == 1 and redis.call('hexists', KEYS[1], ARGV[1]) == 0 then
    return { 0, redis.call('pttl', KEYS[1]) }
end
redis.call('hincrby', KEYS[1], ARGV[1], 1)
redis.call('pexpire', KEYS[1], ARGV[2])
return { 1, 0 }
