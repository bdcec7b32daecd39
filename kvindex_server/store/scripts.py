"""What runs inside the store: each script is one atomic step on one partition of one model.

A partition's keys begin with its tag, which keeps them in one slot of a cluster. Behind the tag:

- `b` and a block's key, 8 bytes: its holders, each life u48, group u8, tiers u8
- `p` and a block's key: its placements, each life u48, end u48 (ms of the store's clock), u8 1 when the rank is a
  guess; the store drops it with the last end
- `w`: there while there may be any placements; `c`: second -> how many placed blocks end in it
- `q`: stream -> life and number of its last batch; what is written must fit both
- `a`: the lives that count here, packed; of all others what is met is taken out
- `s`, `v`: stream -> its description, and a word that no other state of them has ever had; in partition 0 only
- `o`: stream -> when its lease ends (ms of the store's clock), its owner, the era in which the store was found to have
  all that was sent ('-': none yet), its trust; in partition 0 only
- `n`: the last life given; in partition 0 only
- `x`: number of a question -> when it ends (ms) and the question; `y` and the number: replica -> its answer; in
  partition 0 only

A life is a number never given twice, also not by a store that lost its memory: it is at least the time in ms.

An era is the time of one primary: a replica that takes over begins another one, and so does a server that starts. What
was sent to the primary before may be missing then, so that nothing counts as known until each writer has looked.
"""

from kvindex_server.store.client import Script

_SETTLED = """
-- While a cluster moves these keys to another node, one by one, those that are elsewhere would be taken for none: two
-- keys, one of which never is, are refused then.
redis.call('EXISTS', ARGV[1] .. 'q', ARGV[1] .. '-')
"""


def _settled(text: str) -> Script:
    """A script that does nothing while its partition is on the way from one node to another."""
    shebang, rest = text.split("\n", 1)
    return Script(f"{shebang}{_SETTLED}{rest}")


_ERA = """
local about = redis.call('INFO', 'replication')
local era = string.sub(string.match(about, 'master_replid:(%w+)'), 1, 16)
"""
_PRIMARY = (
    _ERA
    + """
-- It was a primary when this connection was made.
if not string.find(about, 'role:master', 1, true) then return redis.error_reply('READONLY now a replica') end
"""
)

OPEN = _settled("""#!lua flags=allow-oom
-- tag, stream, packed life or '', owner, lease in ms: a new life, in partition 0 only for who has the lease
local tag, name, life = ARGV[1], ARGV[2], ARGV[3]
local was = redis.call('HGET', tag .. 'q', name)
local old = was and string.match(was, '^(%d+):')
if life == '' then
  local t = redis.call('TIME')
  local now = t[1] * 1000 + math.floor(t[2] / 1000)
  local lease = redis.call('HGET', tag .. 'o', name)
  if lease then
    local ends, owner = string.match(lease, '^(%d+) (%S+) ')
    if owner ~= ARGV[4] and tonumber(ends) > now then return {0, tonumber(ends) - now} end
  end
  local last = redis.call('GET', tag .. 'n')
  life = math.max(now, (tonumber(last) or 0) + 1)
  redis.call('SET', tag .. 'n', string.format('%.0f', life))
  redis.call('HSET', tag .. 'o', name, string.format('%.0f %s - ', now + tonumber(ARGV[5]), ARGV[4]))
  redis.call('HDEL', tag .. 's', name)
  redis.call('SET', tag .. 'v', string.format('%.0f:0', life))
else
  life = struct.unpack('<I6', life)
  if old and tonumber(old) >= life then return {0, 0} end
end
if old then redis.call('SREM', tag .. 'a', struct.pack('<I6', tonumber(old))) end
redis.call('SADD', tag .. 'a', struct.pack('<I6', life))
redis.call('HSET', tag .. 'q', name, string.format('%.0f:0', life))
return {life, 0}
""")

_APPLY = """
-- tag, stream, life, packed life, number of the batch, description or '', rows
local tag, name, me, rows = ARGV[1], ARGV[2], ARGV[4], ARGV[7]
local number = tonumber(ARGV[5])
local was = redis.call('HGET', tag .. 'q', name)
if not was then return 'LOST' end
if string.match(was, '^(%d+):') ~= ARGV[3] then return 'FENCED' end
local last = tonumber(string.match(was, ':(%d+)$'))
if last == number then return 'OK' end
if last ~= number - 1 then return 'LOST' end
local alive = {[me] = true}
local function counts(life)
  if alive[life] == nil then alive[life] = redis.call('SISMEMBER', tag .. 'a', life) == 1 end
  return alive[life]
end
local sub, byte, band, bor = string.sub, string.byte, bit.band, bit.bor
local STEP = 11 * 512
local placing, confirmed, of_pod = redis.call('EXISTS', tag .. 'w') == 1, 0, nil
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function same_pod(life)  -- another rank of this stream's pod
  if of_pod == nil then
    local pod, streams = string.match(name, '^%d+ (.*)$'), redis.call('HGETALL', tag .. 'q')
    of_pod = {}
    for i = 1, #streams, 2 do
      if string.match(streams[i], '^%d+ (.*)$') == pod then
        of_pod[struct.pack('<I6', tonumber(string.match(streams[i + 1], '^(%d+):')))] = true
      end
    end
  end
  return of_pod[life]
end
local function confirm(key)  -- the engine has it: what was placed on it there, or guessed to be there, is over
  local old = redis.call('GET', tag .. 'p' .. key)
  if not old then return end
  local rest = {}
  for j = 1, #old, 13 do
    local life = sub(old, j, j + 5)
    if life == me or (byte(old, j + 12) == 1 and same_pod(life)) then
      if struct.unpack('<I6', sub(old, j + 6, j + 11)) > now then confirmed = confirmed + 1 end
    else rest[#rest + 1] = sub(old, j, j + 12) end
  end
  if #rest * 13 == #old then return end
  if #rest == 0 then redis.call('UNLINK', tag .. 'p' .. key)
  else redis.call('SET', tag .. 'p' .. key, table.concat(rest), 'KEEPTTL') end
end
for from = 1, #rows, STEP do
  local to = math.min(#rows, from + STEP - 1)
  local names, place = {}, {}
  for i = from, to, 11 do
    local key = sub(rows, i, i + 7)
    if place[key] == nil then
      names[#names + 1] = tag .. 'b' .. key
      place[key] = #names
    end
  end
  local values = redis.call('MGET', unpack(names))
  local changed = {}
  for i = from, to, 11 do
    local at = place[sub(rows, i, i + 7)]
    local group, held, gone = byte(rows, i + 8, i + 10)
    if not GROW then held = 0 end
    local old = values[at] or ''
    local tiers, rest = 0, {}
    for j = 1, #old, 8 do
      local life = sub(old, j, j + 5)
      if life == me and byte(old, j + 6) == group then tiers = byte(old, j + 7)
      elseif counts(life) then rest[#rest + 1] = sub(old, j, j + 7) end
    end
    -- What is gone without having been here was stored and removed between two batches.
    if placing and (held > 0 or band(tiers, gone) ~= gone) then confirm(sub(rows, i, i + 7)) end
    tiers = bor(band(tiers, 255 - gone), held)
    if tiers > 0 then rest[#rest + 1] = me .. string.char(group, tiers) end
    local new = table.concat(rest)
    if new ~= old then
      values[at] = new
      changed[at] = true
    end
  end
  local sets, empties = {}, {}
  for at in pairs(changed) do
    if values[at] == '' then empties[#empties + 1] = names[at]
    else
      sets[#sets + 1] = names[at]
      sets[#sets + 1] = values[at]
    end
  end
  if #sets > 0 then redis.call('MSET', unpack(sets)) end
  if #empties > 0 then redis.call('UNLINK', unpack(empties)) end
end
if ARGV[6] ~= '' then
  redis.call('HSET', tag .. 's', name, ARGV[6])
  redis.call('SET', tag .. 'v', ARGV[3] .. ':' .. ARGV[5])
end
redis.call('HSET', tag .. 'q', name, ARGV[3] .. ':' .. ARGV[5])
return confirmed > 0 and 'OK ' .. confirmed or 'OK'
"""

APPLY = _settled("#!lua\nlocal GROW = true" + _APPLY)
"""Refused by the store as a whole when it is full."""

RELEASE = _settled("#!lua flags=allow-oom\nlocal GROW = false" + _APPLY)
"""The same without what came to be held: what is gone must go from a full store too."""

READ = _settled(f"""#!lua flags=no-writes
-- tag, known word or '-' when no descriptions are wanted, keys, '1' to end at the first block that nobody holds
{_PRIMARY}
local tag, known, keys, stop = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local word, streams = '', false
if known ~= '-' then
  word = era .. ' ' .. (redis.call('GET', tag .. 'v') or '')
  if word ~= known then
    streams = redis.call('HVALS', tag .. 's')
    stop = false
  end
end
local out = {{}}
local now
if redis.call('EXISTS', tag .. 'w') == 1 then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local function living(old)
  local placed = {{}}
  for j = 1, #old, 13 do
    if struct.unpack('<I6', string.sub(old, j + 6, j + 11)) > now then
      placed[#placed + 1] = string.sub(old, j, j + 5) .. '\\0\\0'
    end
  end
  return table.concat(placed)
end
local step, from = stop and 64 or 1024, 1
while from <= #keys do
  local to = math.min(#keys, from + 8 * step - 1)
  local names = {{}}
  for i = from, to, 8 do names[#names + 1] = tag .. 'b' .. string.sub(keys, i, i + 7) end
  local values = redis.call('MGET', unpack(names))
  if now then
    for i = 1, #names do names[i] = tag .. 'p' .. string.sub(keys, from + 8 * i - 8, from + 8 * i - 1) end
    local placed = redis.call('MGET', unpack(names))
    for i = 1, #names do
      if placed[i] then
        local value = (values[i] or '') .. living(placed[i])
        values[i] = value ~= '' and value
      end
    end
  end
  for i = 1, #names do
    local value = values[i]
    if value then
      local n = #value / 8
      out[#out + 1] = string.char(n % 256, math.floor(n / 256))
      out[#out + 1] = value
    elseif stop then
      return {{word, streams, table.concat(out), era}}
    else
      out[#out + 1] = '\\0\\0'
    end
  end
  from = to + 1
  step = math.min(1024, step * 2)
end
return {{word, streams, table.concat(out), era}}
""")

LIFE_IS_OVER, NO_ROOM = -1, -2
"""What PLACE says instead of a number."""

PLACE = _settled("""#!lua
-- tag, packed life, ttl in ms, 1 when the rank is a guess, full-attention groups, most blocks placed at once, keys:
-- how many the stream holds already, are placed anew, and were; or -1 when the life is over, -2 when they are too many
local tag, me, keys = ARGV[1], ARGV[2], ARGV[7]
local guessed, full, most = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
if redis.call('SISMEMBER', tag .. 'a', me) == 0 then return {-1, 0, 0} end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local ends = now + tonumber(ARGV[3])
local function held(value)
  local missing = #full
  for j = 1, #(value or ''), 8 do
    local group = string.sub(value, j + 6, j + 6)
    if string.sub(value, j, j + 5) == me and string.find(full, group, 1, true) then missing = missing - 1 end
  end
  return #full > 0 and missing == 0
end
local sets, holding, recorded, renewed = {}, 0, 0, 0
for from = 1, #keys, 8 * 1024 do
  local blocks, places = {}, {}
  for i = from, math.min(#keys, from + 8 * 1024 - 1), 8 do
    local key = string.sub(keys, i, i + 7)
    blocks[#blocks + 1] = tag .. 'b' .. key
    places[#places + 1] = tag .. 'p' .. key
  end
  local values, placed = redis.call('MGET', unpack(blocks)), redis.call('MGET', unpack(places))
  for i = 1, #blocks do
    if held(values[i]) then holding = holding + 1
    else
      local rest, last, guess, again = {}, ends, guessed, false
      local mine = ends
      for j = 1, #(placed[i] or ''), 13 do
        local life, over = string.sub(placed[i], j, j + 5), struct.unpack('<I6', string.sub(placed[i], j + 6, j + 11))
        if over > now then
          last = math.max(last, over)
          if life == me then
            again, mine = true, math.max(ends, over)
            guess = math.min(guess, string.byte(placed[i], j + 12))
          else rest[#rest + 1] = string.sub(placed[i], j, j + 12) end
        end
      end
      rest[#rest + 1] = me .. struct.pack('<I6', mine) .. string.char(guess)
      sets[#sets + 1] = {places[i], table.concat(rest), last}
      if again then renewed = renewed + 1 else recorded = recorded + 1 end
    end
  end
end
local counts, room = redis.call('HGETALL', tag .. 'c'), most - recorded
for i = 1, #counts, 2 do
  if tonumber(counts[i]) * 1000 + 1000 <= now then redis.call('HDEL', tag .. 'c', counts[i])
  else room = room - tonumber(counts[i + 1]) end
end
if room < 0 then return {-2, 0, 0} end
local last = math.max(ends, tonumber(redis.call('GET', tag .. 'w') or 0))
for _, each in ipairs(sets) do
  redis.call('SET', each[1], each[2], 'PXAT', string.format('%.0f', each[3]))
end
if #sets > 0 then
  redis.call('SET', tag .. 'w', string.format('%.0f', last), 'PXAT', string.format('%.0f', last))
  local second = string.format('%.0f', math.floor(ends / 1000))
  redis.call('HSET', tag .. 'c', second, recorded + tonumber(redis.call('HGET', tag .. 'c', second) or 0))
end
return {holding, recorded, renewed}
""")

CLOSE = _settled("""#!lua flags=allow-oom
-- tag, stream, life, packed life: the stream is gone, if this is still its life
local tag, name = ARGV[1], ARGV[2]
local was = redis.call('HGET', tag .. 'q', name)
if not was or string.match(was, '^(%d+):') ~= ARGV[3] then return 'FENCED' end
redis.call('SREM', tag .. 'a', ARGV[4])
redis.call('HDEL', tag .. 'q', name)
redis.call('HDEL', tag .. 'o', name)
redis.call('HDEL', tag .. 's', name)
redis.call('SET', tag .. 'v', ARGV[3] .. ':end')
return 'OK'
""")

RENEW = _settled(f"""#!lua flags=allow-oom
-- tag, owner, lease in ms or '', then per stream: name, life, number of the last batch or '', trust
{_ERA}
local tag, t, out = ARGV[1], redis.call('TIME'), {{era}}
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for i = 4, #ARGV, 4 do
  local was = redis.call('HGET', tag .. 'q', ARGV[i])
  if not was or string.match(was, '^(%d+):') ~= ARGV[i + 1] then
    out[#out + 1] = was and 'FENCED' or 'LOST'
  elseif ARGV[i + 2] ~= '' and string.match(was, ':(%d+)$') ~= ARGV[i + 2] then
    out[#out + 1] = 'LOST'
  else
    out[#out + 1] = 'OK'
    if ARGV[3] ~= '' then
      local ends = string.format('%.0f', now + tonumber(ARGV[3]))
      local seen = era
      if ARGV[i + 2] == '' then  -- not looked: what was found in another era is what is known
        seen = string.match(redis.call('HGET', tag .. 'o', ARGV[i]) or '', '^%d+ %S+ (%S+) ') or '-'
      end
      redis.call('HSET', tag .. 'o', ARGV[i], ends .. ' ' .. ARGV[2] .. ' ' .. seen .. ' ' .. ARGV[i + 3])
    end
  end
end
return out
""")

LEASES = _settled(f"""#!lua flags=no-writes
-- tag: the store's time in ms, then stream and lease in turns, then number of a question and question in turns
{_PRIMARY}
local t = redis.call('TIME')
local now, asked, open = t[1] * 1000 + math.floor(t[2] / 1000), redis.call('HGETALL', ARGV[1] .. 'x'), {{}}
for i = 1, #asked, 2 do
  if struct.unpack('<I6', asked[i + 1]) > now then
    open[#open + 1] = asked[i]
    open[#open + 1] = string.sub(asked[i + 1], 7)
  end
end
return {{now, redis.call('HGETALL', ARGV[1] .. 'o'), open}}
""")

GONE = _settled("""#!lua flags=no-writes
-- tag, ms: stream and life in turns, of each whose lease ended longer ago than that
local t, out = redis.call('TIME'), {}
local since = t[1] * 1000 + math.floor(t[2] / 1000) - tonumber(ARGV[2])
local leases = redis.call('HGETALL', ARGV[1] .. 'o')
for i = 1, #leases, 2 do
  local was = redis.call('HGET', ARGV[1] .. 'q', leases[i])
  if was and tonumber(string.match(leases[i + 1], '^(%d+) ')) < since then
    out[#out + 1] = leases[i]
    out[#out + 1] = string.match(was, '^(%d+):')
  end
end
return out
""")

SWEEP = _settled("""#!lua flags=allow-oom
-- tag, then blocks' keys: takes dead holders out; returns how many there were
local tag, alive, dead = ARGV[1], {}, 0
for i = 2, #ARGV do
  local name = tag .. 'b' .. ARGV[i]
  local old = redis.call('GET', name) or ''
  local rest = {}
  for j = 1, #old, 8 do
    local life = string.sub(old, j, j + 5)
    if alive[life] == nil then alive[life] = redis.call('SISMEMBER', tag .. 'a', life) == 1 end
    if alive[life] then rest[#rest + 1] = string.sub(old, j, j + 7) else dead = dead + 1 end
  end
  if #rest * 8 < #old then
    if #rest == 0 then redis.call('UNLINK', name) else redis.call('SET', name, table.concat(rest)) end
  end
end
return dead
""")

ASK = _settled("""#!lua
-- tag, number of the question, question, how long it stands in ms
local name, t = ARGV[1] .. 'x', redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local asked = redis.call('HGETALL', name)
for i = 1, #asked, 2 do  -- whoever asked is gone
  if struct.unpack('<I6', asked[i + 1]) <= now then redis.call('HDEL', name, asked[i]) end
end
redis.call('HSET', name, ARGV[2], struct.pack('<I6', now + tonumber(ARGV[4])) .. ARGV[3])
redis.call('PEXPIRE', name, ARGV[4])
""")

ANSWER = _settled("""#!lua
-- tag, number of the question, replica, its answer, how long it stands in ms
if redis.call('HEXISTS', ARGV[1] .. 'x', ARGV[2]) == 0 then return end
redis.call('HSET', ARGV[1] .. 'y' .. ARGV[2], ARGV[3], ARGV[4])
redis.call('PEXPIRE', ARGV[1] .. 'y' .. ARGV[2], ARGV[5])
""")

ANSWERS = _settled(f"""#!lua flags=no-writes
-- tag, number of the question: what has been said
{_PRIMARY}
return redis.call('HVALS', ARGV[1] .. 'y' .. ARGV[2])
""")

FORGET = _settled("""#!lua flags=allow-oom
-- tag, number of a question that nobody waits for any more
redis.call('HDEL', ARGV[1] .. 'x', ARGV[2])
redis.call('UNLINK', ARGV[1] .. 'y' .. ARGV[2])
""")
