-- Renews the lease, if this owner still holds the lock.
--   KEYS[1] the lock    ARGV[1] the owner    ARGV[2] the lease in milliseconds
-- Returns 1, or 0 if the owner has lost the lock.
if redis.call('hget', KEYS[1], 'owner') ~= ARGV[1] then
    return 0
end
return redis.call('pexpire', KEYS[1], ARGV[2])
