-- Acquires the lock and issues a token greater than all before it, or returns the remaining TTL of its current lease.
--   KEYS[1] the lock    KEYS[2] the last token
--   ARGV[1] the owner    ARGV[2] the lease in milliseconds    ARGV[3] the acquisition id
-- Returns {1, hold count, token} or {0, TTL in milliseconds, 0}.
local own = redis.call('hget', KEYS[1], 'owner') == ARGV[1]
if not own and redis.call('exists', KEYS[1]) == 1 then
    return { 0, redis.call('pttl', KEYS[1]), 0 }
end
local token = tonumber(redis.call('get', KEYS[2]) or '0')
-- A reentrant acquisition keeps the token, unless Redis lost it.
if not own or token == 0 then
    -- A counter alone would restart at 1 after Redis lost its data. The clock in microseconds does not, and no lock is
    -- acquired a million times a second, so the counter never runs ahead of the clock.
    local time = redis.call('time')
    local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
    token = math.max(now, token + 1)
    -- Expires after a day, so that keys of unused or invented names do not stay for ever. By then the clock is enough.
    redis.call('set', KEYS[2], string.format('%.0f', token), 'EX', 86400)
end
redis.call('hset', KEYS[1], 'owner', ARGV[1], ARGV[3], 1)
redis.call('pexpire', KEYS[1], ARGV[2])
return { 1, redis.call('hlen', KEYS[1]) - 1, token }
