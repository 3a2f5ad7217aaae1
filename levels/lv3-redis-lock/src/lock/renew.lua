-- Starts the lease afresh, if the lock is still this owner's.
--   KEYS[1] the lock    ARGV[1] the owner    ARGV[2] the lease in milliseconds
-- Answers 1, or 0 for an owner that has lost it.
if redis.call('hget', KEYS[1], 'owner') ~= ARGV[1] then
    return 0
end
return redis.call('pexpire', KEYS[1], ARGV[2])
