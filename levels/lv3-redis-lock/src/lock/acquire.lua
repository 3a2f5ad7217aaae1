-- Takes the lock, or says how long it will stay taken at most.
--   KEYS[1] the lock    ARGV[1] the owner    ARGV[2] the lease in milliseconds    ARGV[3] the hold
-- The lock is a hash: `owner`, and a field for each hold. So a hold that is asked for or given back twice counts once.
-- Answers {1, how often it is held, 0}, or {0, milliseconds, 0}.
if redis.call('hget', KEYS[1], 'owner') ~= ARGV[1] and redis.call('exists', KEYS[1]) == 1 then
    return { 0, redis.call('pttl', KEYS[1]), 0 }
end
redis.call('hset', KEYS[1], 'owner', ARGV[1], ARGV[3], 1)
redis.call('pexpire', KEYS[1], ARGV[2])
return { 1, redis.call('hlen', KEYS[1]) - 1, 0 }
