-- Opens the lock, whoever holds it and however often, and wakes whoever waits for it.
--   KEYS[1] the lock    ARGV[1] the channel of its releases
-- Answers 1, or 0 if there was nothing to open.
if redis.call('del', KEYS[1]) == 0 then
    return 0
end
redis.call('publish', ARGV[1], 'released')
return 1
