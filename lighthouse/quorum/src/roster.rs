//! Who is alive and who asks, with the counts that a decision needs always up to date.
//!
//! An event touches one id; only a new quorum looks at all of them. Every id has one alarm, the
//! moment at which its silence may mean something; a heartbeat does not move it, the alarm looks at
//! the last heartbeat when it rings. An id is forgotten when it was silent for
//! [`Rules::memory`], does not ask, and is not in the last quorum: so what is remembered is bounded
//! by who was heard lately.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::decide::Census;
use crate::member::{Member, Quorum, ReplicaId, Ticket};
use crate::rules::Rules;

/// One remembered id.
#[derive(Debug)]
pub(crate) struct Peer {
    /// When it was last heard.
    pub(crate) heard: Duration,
    /// Heard less than the heartbeat timeout ago.
    pub(crate) healthy: bool,
    /// Its request, while it has one.
    pub(crate) asking: Option<Asking>,
    /// What it was in the last quorum.
    pub(crate) old: Option<Standing>,
    /// Its entry among the alarms.
    alarm: Duration,
}

/// A request that waits.
#[derive(Debug)]
pub(crate) struct Asking {
    pub(crate) ticket: Ticket,
    pub(crate) member: Arc<Member>,
    /// Since when it waits for the quorum that is forming now.
    since: Duration,
    /// The lighthouse stood still while it waited.
    pub(crate) excused: bool,
}

/// What a member of the last quorum had to do there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It was at the highest step.
    UpToDate,
    /// It was behind and was told to heal.
    ToHeal,
}

/// All remembered ids.
#[derive(Debug)]
pub(crate) struct Roster {
    rules: Rules,
    peers: BTreeMap<ReplicaId, Peer>,
    tickets: HashMap<Ticket, ReplicaId>,
    alarms: BTreeSet<(Duration, ReplicaId)>,
    /// Those who ask and are healthy, the longest waiting first.
    queue: BTreeSet<(Duration, ReplicaId)>,
    census: Census,
    looks: u64,
}

impl Roster {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            peers: BTreeMap::new(),
            tickets: HashMap::new(),
            alarms: BTreeSet::new(),
            queue: BTreeSet::new(),
            census: Census::default(),
            looks: 0,
        }
    }

    /// The counts as of the last event.
    pub(crate) fn census(&self) -> Census {
        Census {
            first_asked: self.queue.first().map(|(since, _)| *since),
            ..self.census
        }
    }

    /// All ids with what is known of them, sorted.
    pub(crate) fn peers(&self) -> impl Iterator<Item = (&ReplicaId, &Peer)> {
        self.peers.iter()
    }

    /// The request behind a ticket.
    pub(crate) fn request(&self, ticket: Ticket) -> Option<(&Peer, &Asking)> {
        let peer = self.peers.get(self.tickets.get(&ticket)?)?;
        Some((peer, peer.asking.as_ref()?))
    }

    /// Whether somebody waits for an answer.
    pub(crate) fn is_asked(&self) -> bool {
        !self.tickets.is_empty()
    }

    /// Whether somebody's silence would mean something, or somebody waits.
    pub(crate) fn is_watched(&self) -> bool {
        self.is_asked() || self.census.all.healthy > 0
    }

    /// The next moment at which silence may mean something.
    pub(crate) fn next_alarm(&self) -> Option<Duration> {
        self.alarms.first().map(|(at, _)| *at)
    }

    /// How many times an id was looked at because of an event that was not its own.
    pub(crate) fn looks(&self) -> u64 {
        self.looks
    }

    /// Nobody could be heard or ask during the last `gap`: it counts neither as a silence of those
    /// that were healthy, nor as patience of those that asked.
    pub(crate) fn excuse(&mut self, gap: Duration, now: Duration) {
        let ids: Vec<_> = self.peers.keys().cloned().collect();
        self.looks += ids.len() as u64;
        for id in ids {
            self.change(&id, |peer| {
                if peer.healthy {
                    peer.heard = now;
                }
                if let Some(asking) = &mut peer.asking {
                    asking.since += gap;
                    asking.excused = true;
                }
            });
        }
    }

    /// This id is alive.
    pub(crate) fn hear(&mut self, replica_id: &str, now: Duration) {
        if let Some(peer) = self.peers.get_mut(replica_id) {
            peer.heard = now;
            if peer.healthy {
                return;
            }
        }
        let id = ReplicaId::from(replica_id);
        let alarm = now + self.rules.heartbeat_timeout;
        if let Some(peer) = self.peers.get_mut(&id) {
            self.alarms.remove(&(peer.alarm, id.clone()));
            peer.alarm = alarm;
        } else {
            self.peers.insert(id.clone(), Peer::new(now, alarm));
        }
        self.alarms.insert((alarm, id.clone()));
        self.change(&id, |peer| peer.healthy = true);
    }

    /// Behind this name is another process than in the last quorum: it has no part in that.
    pub(crate) fn replace(&mut self, id: &ReplicaId) {
        self.change(id, |peer| peer.old = None);
    }

    /// A member asks; returns the ticket of its older request, if one still waited.
    pub(crate) fn ask(&mut self, ticket: Ticket, member: Member, now: Duration) -> Option<Ticket> {
        let id = member.replica_id.clone();
        let superseded = self.peers.get(&id)?.asking.as_ref().map(|a| a.ticket);
        if let Some(older) = superseded {
            self.tickets.remove(&older);
        }
        self.tickets.insert(ticket, id.clone());
        let asking = Asking {
            ticket,
            member: Arc::new(member),
            since: now,
            excused: false,
        };
        self.change(&id, |peer| peer.asking = Some(asking));
        superseded
    }

    /// Withdraws a request.
    pub(crate) fn withdraw(&mut self, ticket: Ticket) -> Option<Arc<Member>> {
        let id = self.tickets.remove(&ticket)?;
        let mut member = None;
        self.change(&id, |peer| {
            member = peer.asking.take().map(|asking| asking.member);
        });
        member
    }

    /// Lets the alarms ring that are due; returns those of the last quorum that have fallen silent.
    pub(crate) fn pass_time(&mut self, now: Duration) -> Vec<ReplicaId> {
        let mut fell_silent = Vec::new();
        while self.next_alarm().is_some_and(|at| at <= now) {
            let Some((_, id)) = self.alarms.pop_first() else {
                break;
            };
            self.looks += 1;
            if self.ring(&id, now) {
                fell_silent.push(id);
            }
        }
        fell_silent
    }

    /// One alarm; true if a member of the last quorum has just fallen silent.
    fn ring(&mut self, id: &ReplicaId, now: Duration) -> bool {
        let Some(peer) = self.peers.get(id) else {
            return false;
        };
        let silent_at = peer.heard + self.rules.heartbeat_timeout;
        let forgotten_at = peer.heard + self.rules.memory();
        let (falls, old) = (peer.healthy && silent_at <= now, peer.old.is_some());
        let needed = peer.asking.is_some() || old;
        let next = if silent_at > now {
            silent_at
        } else if forgotten_at > now {
            forgotten_at
        } else if needed {
            now + self.rules.memory()
        } else {
            self.change(id, |peer| peer.healthy = false);
            self.peers.remove(id);
            return false;
        };
        self.alarms.insert((next, id.clone()));
        self.change(id, |peer| {
            peer.alarm = next;
            peer.healthy &= !falls;
        });
        falls && old
    }

    /// Changes what is known of one id, and the counts with it.
    fn change(&mut self, id: &ReplicaId, change: impl FnOnce(&mut Peer)) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        if let Some(asking) = peer.candidate() {
            self.queue.remove(&(asking.since, id.clone()));
        }
        self.census.count(peer, |n| *n -= 1);
        change(peer);
        self.census.count(peer, |n| *n += 1);
        if let Some(asking) = peer.candidate() {
            self.queue.insert((asking.since, id.clone()));
        }
    }

    /// Takes the requests of all candidates out, sorted by id.
    pub(crate) fn take_candidates(&mut self) -> (Vec<Ticket>, Vec<Arc<Member>>) {
        let shrinking = self.census.is_shrinking();
        self.looks += self.peers.len() as u64;
        self.peers
            .values_mut()
            .filter(|peer| peer.healthy && (peer.old.is_some() || !shrinking))
            .filter_map(|peer| peer.asking.take())
            .inspect(|asking| {
                self.tickets.remove(&asking.ticket);
            })
            .map(|asking| (asking.ticket, asking.member))
            .unzip()
    }

    /// Requests of healthy members of the last quorum that were told to heal there, sorted by id.
    pub(crate) fn unhealed(&mut self) -> Vec<Ticket> {
        self.looks += self.peers.len() as u64;
        self.peers
            .values()
            .filter(|peer| peer.old == Some(Standing::ToHeal))
            .filter_map(|peer| peer.candidate().map(|asking| asking.ticket))
            .collect()
    }

    /// A quorum has formed: it is the last one from now on. Those still waiting wait anew.
    pub(crate) fn follow(&mut self, quorum: &Quorum, now: Duration) {
        let floor = quorum.max_step();
        self.looks += self.peers.len() as u64;
        for (id, peer) in &mut self.peers {
            peer.old = quorum.member(id.as_str()).map(|m| Standing::of(m, floor));
            if let Some(asking) = &mut peer.asking {
                asking.since = now;
            }
        }
        self.recount(floor, quorum.members.len());
    }

    fn recount(&mut self, floor: i64, old_total: usize) {
        self.census = Census {
            floor,
            old_total,
            ..Census::default()
        };
        self.queue.clear();
        for (id, peer) in &self.peers {
            self.census.count(peer, |n| *n += 1);
            if let Some(asking) = peer.candidate() {
                self.queue.insert((asking.since, id.clone()));
            }
        }
    }
}

impl Peer {
    /// Just heard, but not counted as healthy yet.
    fn new(heard: Duration, alarm: Duration) -> Self {
        Self {
            heard,
            healthy: false,
            asking: None,
            old: None,
            alarm,
        }
    }

    fn candidate(&self) -> Option<&Asking> {
        self.asking.as_ref().filter(|_| self.healthy)
    }
}

impl Standing {
    fn of(member: &Member, floor: i64) -> Self {
        if member.step >= floor {
            Self::UpToDate
        } else {
            Self::ToHeal
        }
    }
}

impl Census {
    /// Adds one id to all counts that it belongs to, or takes it out of them.
    fn count(&mut self, peer: &Peer, step: fn(&mut usize)) {
        if !peer.healthy {
            return;
        }
        let floor = self.floor;
        let request = peer.asking.as_ref().map(|asking| &asking.member);
        let counts = [Some(&mut self.all), peer.old.map(|_| &mut self.old)];
        for count in counts.into_iter().flatten() {
            step(&mut count.healthy);
            if let Some(member) = request {
                step(&mut count.asking);
                if member.step >= floor {
                    step(&mut count.at_floor);
                }
            }
        }
        if request.is_some_and(|member| member.shrink_only) {
            step(&mut self.shrink_only);
        }
        if request.is_some() && peer.old == Some(Standing::UpToDate) {
            step(&mut self.old_donors_asking);
        }
    }
}
