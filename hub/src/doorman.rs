//! What strangers may do before they prove who they are: how many sockets they hold, how often they come,
//! how often they are wrong. No IO and no clock; memory is bounded whatever they do.
//!
//! An address counts as its network, /32 of IPv4 and /64 of IPv6, which is what one customer gets. Loopback
//! is nobody's address: behind it may be a proxy that the hub was not told of, with everybody behind it, and
//! a limit would let one stranger lock all others out. Such visitors share the total alone.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    bucket::Bucket,
    limits::{
        BAR_TIME, CONNECTIONS_AT_ONCE, CONNECTIONS_PER_SEC, FAILURES_AT_ONCE, FAILURES_PER_SEC,
        MAX_ADDRESSES, MAX_UNAUTHENTICATED, REFUSALS_AT_ONCE, REFUSALS_PER_SEC, REFUSED_RETRY,
    },
};

/// A network whose strangers are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Origin(IpAddr);

impl Origin {
    /// `None` for loopback.
    fn of(address: IpAddr) -> Option<Self> {
        match address.to_canonical() {
            address if address.is_loopback() => None,
            IpAddr::V4(address) => Some(Self(address.into())),
            IpAddr::V6(address) => {
                let network = address.to_bits() >> 64 << 64;
                Some(Self(Ipv6Addr::from_bits(network).into()))
            }
        }
    }
}

/// Why a stranger is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// So many strangers are here that nobody else is taken.
    Full,
    /// Too many of them are of this address.
    Share,
    /// The address comes too often.
    Rate,
    /// Too many tries of the address to authenticate failed.
    Failures,
}

/// A stranger is sent away, but told so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// When it may come again.
    pub retry_in: Duration,
}

/// What is known of an address.
#[derive(Debug)]
struct Account {
    sockets: usize,
    connections: Bucket,
    refusals: Bucket,
    failures: Bucket,
    barred_until: Instant,
}

impl Account {
    fn new(now: Instant) -> Self {
        let full = Bucket::full(now);
        Self { sockets: 0, connections: full, refusals: full, failures: full, barred_until: now }
    }

    /// Whether it is as if it had never been.
    fn is_blank(&self, now: Instant) -> bool {
        let buckets = [&self.connections, &self.refusals, &self.failures];
        self.sockets == 0
            && self.barred_until <= now
            && buckets.iter().all(|bucket| bucket.is_full(now))
    }

    fn check_bar(&self, now: Instant) -> Result<(), Refusal> {
        let retry_in = self.barred_until.saturating_duration_since(now);
        if retry_in.is_zero() {
            Ok(())
        } else {
            Err(Refusal { reason: Reason::Failures, retry_in })
        }
    }

    /// Takes one more connection, while so many places are `left`.
    fn knock(&mut self, left: usize, now: Instant) -> Result<(), Refusal> {
        self.check_bar(now)?;
        // Half of what is left: one address alone gets a third of all places, and each further one finds
        // some.
        if self.sockets * 2 > left {
            return Err(Refusal { reason: Reason::Share, retry_in: REFUSED_RETRY });
        }
        self.connections
            .take(CONNECTIONS_PER_SEC, CONNECTIONS_AT_ONCE, now)
            .map_err(|retry_in| Refusal { reason: Reason::Rate, retry_in })
    }
}

#[derive(Debug, Default)]
struct Tables {
    /// Places that are taken.
    inside: usize,
    accounts: BTreeMap<Origin, Account>,
}

impl Tables {
    fn account(&mut self, origin: Origin, now: Instant) -> &mut Account {
        if self.accounts.len() >= MAX_ADDRESSES && !self.accounts.contains_key(&origin) {
            self.accounts.retain(|_, account| !account.is_blank(now));
            // A flood from everywhere: only the total helps, so the rest of what is known is not worth
            // looking through it at every further connection.
            if self.accounts.len() > MAX_ADDRESSES / 2 {
                self.accounts.retain(|_, account| account.sockets > 0);
            }
        }
        self.accounts.entry(origin).or_insert_with(|| Account::new(now))
    }

    fn left(&self) -> usize {
        MAX_UNAUTHENTICATED - self.inside
    }
}

/// Keeps the door of one listener.
#[derive(Debug, Default)]
pub struct Doorman {
    tables: Mutex<Tables>,
}

impl Doorman {
    /// No step under the lock can fail half-way, so the state behind a poisoned lock is sound.
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a new connection a place, if only to be told that it is refused. `address` is `None` for a
    /// trusted proxy, which will say for whom it comes ([`Doorman::identify`]).
    ///
    /// # Errors
    /// Why it is dropped without a word: there is a flood, and each word costs.
    pub fn accept(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        now: Instant,
    ) -> Result<(Place, Option<Refusal>), Reason> {
        let mut tables = self.lock();
        let left = tables.left();
        if left == 0 {
            return Err(Reason::Full);
        }
        let origin = address.and_then(Origin::of);
        let mut refused = None;
        if let Some(origin) = origin {
            let account = tables.account(origin, now);
            if let Err(refusal) = account.knock(left, now) {
                let told = account.refusals.take(REFUSALS_PER_SEC, REFUSALS_AT_ONCE, now);
                if told.is_err() || account.sockets > left {
                    return Err(refusal.reason);
                }
                refused = Some(refusal);
            }
            account.sockets += 1;
        }
        tables.inside += 1;
        Ok((Place { doorman: Arc::clone(self), origin }, refused))
    }

    /// Counts a request, and from here on the place of its connection, for whom a trusted proxy brings it.
    ///
    /// # Errors
    /// It is to be refused.
    pub fn identify(
        &self,
        place: &mut Place,
        address: IpAddr,
        now: Instant,
    ) -> Result<(), Refusal> {
        let mut tables = self.lock();
        tables.leave(place.origin.take());
        let Some(origin) = Origin::of(address) else {
            return Ok(());
        };
        let left = tables.left();
        let account = tables.account(origin, now);
        let known = account.knock(left, now);
        account.sockets += 1;
        place.origin = Some(origin);
        known
    }

    /// Whether an address may try to authenticate.
    ///
    /// # Errors
    /// It has failed too often of late.
    pub fn may_try(&self, address: IpAddr, now: Instant) -> Result<(), Refusal> {
        let tables = self.lock();
        let account = Origin::of(address).and_then(|origin| tables.accounts.get(&origin));
        account.map_or(Ok(()), |account| account.check_bar(now))
    }

    /// Notes that somebody at an address failed to authenticate.
    pub fn note_failure(&self, address: IpAddr, now: Instant) {
        if let Some(origin) = Origin::of(address) {
            let mut tables = self.lock();
            let account = tables.account(origin, now);
            if account.failures.take(FAILURES_PER_SEC, FAILURES_AT_ONCE, now).is_err() {
                account.barred_until = now + BAR_TIME;
            }
        }
    }

    /// Strangers who are here.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.lock().inside
    }
}

impl Tables {
    fn leave(&mut self, origin: Option<Origin>) {
        if let Some(account) = origin.and_then(|origin| self.accounts.get_mut(&origin)) {
            account.sockets -= 1;
        }
    }
}

/// A place among the strangers; given back when dropped, which is when its holder proved who it is, or left.
#[derive(Debug)]
pub struct Place {
    doorman: Arc<Doorman>,
    origin: Option<Origin>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut tables = self.doorman.lock();
        tables.inside -= 1;
        tables.leave(self.origin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    /// Connections of an address that come at once and stay: how many are taken, refused, dropped.
    fn crowd(
        doorman: &Arc<Doorman>,
        from: Option<IpAddr>,
        count: usize,
        now: Instant,
    ) -> (Vec<Place>, usize, usize) {
        let (mut places, mut refused, mut dropped) = (Vec::new(), 0, 0);
        for _ in 0..count {
            match doorman.accept(from, now) {
                Ok((place, None)) => places.push(place),
                Ok((place, Some(_))) => {
                    refused += 1;
                    places.push(place);
                }
                Err(_) => dropped += 1,
            }
        }
        (places, refused, dropped)
    }

    #[test]
    fn one_address_leaves_room_for_all_others() {
        let (doorman, now) = (Arc::new(Doorman::default()), Instant::now());
        let (first, refused, dropped) = crowd(&doorman, address("192.0.2.1"), 10_000, now);
        assert!(first.len() < MAX_UNAUTHENTICATED / 2, "{}", first.len());
        assert!(refused > 0 && dropped > 5000, "{refused} {dropped}");
        for other in 2..8 {
            let from = address(&format!("192.0.2.{other}"));
            let (_, refused, dropped) = crowd(&doorman, from, 50, now);
            assert_eq!((refused, dropped), (0, 0), "{other}");
        }
        // Whoever leaves makes room again.
        drop(first);
        assert_eq!(doorman.inside(), 0);
        assert!(matches!(doorman.accept(address("192.0.2.1"), now), Ok((_, None))));
    }

    #[test]
    fn ends_of_a_64_are_one_address_and_loopback_is_none() {
        let (doorman, now) = (Arc::new(Doorman::default()), Instant::now());
        let mut places = Vec::new();
        for host in 0..5000_u32 {
            let from = address(&format!("2001:db8::{:x}:{:x}", host / 100, host % 100));
            places.extend(doorman.accept(from, now));
        }
        assert!(places.len() < MAX_UNAUTHENTICATED / 2, "{}", places.len());
        assert!(matches!(doorman.accept(address("2001:db8:0:1::1"), now), Ok((_, None))));
        drop(places);
        for loopback in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let (places, refused, dropped) =
                crowd(&doorman, address(loopback), MAX_UNAUTHENTICATED + 1, now);
            assert_eq!((places.len(), refused, dropped), (MAX_UNAUTHENTICATED, 0, 1));
        }
    }

    /// 10,000 agents behind one address come back after a restart: all at once, then as they are told.
    #[test]
    fn an_office_comes_back_within_a_minute() {
        let (doorman, start) = (Arc::new(Doorman::default()), Instant::now());
        let from = address("192.0.2.1");
        let mut waiting = vec![start; 10_000];
        let mut places = Vec::new();
        let mut now = start;
        while !waiting.is_empty() {
            assert!(now - start < Duration::from_secs(60), "{} wait", waiting.len());
            waiting.retain_mut(|due| {
                if *due > now {
                    return true;
                }
                match doorman.accept(from, now) {
                    // A login takes a quarter of a second.
                    Ok((place, None)) => {
                        places.push((now + Duration::from_millis(250), place));
                        return false;
                    }
                    Ok((_, Some(refusal))) => *due = now + refusal.retry_in,
                    Err(_) => *due = now + Duration::from_secs(8),
                }
                true
            });
            now += Duration::from_millis(50);
            places.retain(|(done, _)| *done > now);
        }
    }

    #[test]
    fn a_flood_is_slowed_and_a_steady_stream_is_not() {
        let (doorman, start) = (Arc::new(Doorman::default()), Instant::now());
        let steady = Duration::from_secs(1) / CONNECTIONS_PER_SEC;
        for number in 0..3 * CONNECTIONS_AT_ONCE {
            let entered = doorman.accept(address("192.0.2.1"), start + steady * number);
            assert!(matches!(entered, Ok((_, None))), "{number}");
        }
        let mut taken = 0;
        for number in 0..10 * CONNECTIONS_AT_ONCE {
            let entered = doorman.accept(address("192.0.2.2"), start + steady / 10 * number);
            taken += u32::from(matches!(entered, Ok((_, None))));
        }
        assert!(
            (2 * CONNECTIONS_AT_ONCE - 1..=2 * CONNECTIONS_AT_ONCE + 1).contains(&taken),
            "{taken}"
        );
    }

    #[test]
    fn whoever_fails_too_often_has_to_wait() {
        let (doorman, now) = (Arc::new(Doorman::default()), Instant::now());
        let from = address("192.0.2.1").unwrap();
        for _ in 0..FAILURES_AT_ONCE {
            doorman.note_failure(from, now);
        }
        assert_eq!(doorman.may_try(from, now), Ok(()));
        doorman.note_failure(from, now);
        let refusal = Refusal { reason: Reason::Failures, retry_in: BAR_TIME };
        assert_eq!(doorman.may_try(from, now), Err(refusal));
        assert!(matches!(doorman.accept(Some(from), now), Ok((_, Some(told))) if told == refusal));
        assert_eq!(doorman.may_try("192.0.2.2".parse().unwrap(), now), Ok(()));
        assert_eq!(doorman.may_try(from, now + BAR_TIME), Ok(()));
        for _ in 0..10 * FAILURES_AT_ONCE {
            doorman.note_failure("127.0.0.1".parse().unwrap(), now);
        }
        assert_eq!(doorman.may_try("127.0.0.1".parse().unwrap(), now), Ok(()));
    }

    #[test]
    fn whom_a_proxy_brings_is_counted_and_not_the_proxy() {
        let (doorman, now) = (Arc::new(Doorman::default()), Instant::now());
        let mut places = Vec::new();
        let mut refused = 0;
        let (loud, quiet) = (address("192.0.2.1").unwrap(), address("192.0.2.2").unwrap());
        for _ in 0..3000 {
            let (mut place, told) = doorman.accept(None, now).unwrap();
            assert_eq!(told, None);
            match doorman.identify(&mut place, loud, now) {
                Ok(()) => places.push(place),
                Err(refusal) => {
                    assert_eq!(refusal.reason, Reason::Share);
                    refused += 1;
                }
            }
        }
        assert!(refused > 1000, "{refused}");
        let (mut place, _) = doorman.accept(None, now).unwrap();
        assert_eq!(doorman.identify(&mut place, quiet, now), Ok(()));
        // The next request of the same connection is somebody else's.
        assert!(doorman.identify(&mut place, loud, now).is_err());
        assert_eq!(doorman.identify(&mut place, quiet, now), Ok(()));
        drop((place, places));
        assert!(doorman.lock().accounts.values().all(|account| account.sockets == 0));
        assert_eq!(doorman.inside(), 0);
    }

    #[test]
    fn memory_is_bounded() {
        let (doorman, now) = (Arc::new(Doorman::default()), Instant::now());
        let (held, _) = doorman.accept(address("192.0.2.1"), now).unwrap();
        for number in 0..3 * u32::try_from(MAX_ADDRESSES).unwrap() {
            let from = IpAddr::from(number.wrapping_mul(7919).to_be_bytes());
            doorman.note_failure(from, now);
            assert!(doorman.lock().accounts.len() <= MAX_ADDRESSES);
        }
        let held_origin = held.origin.unwrap();
        assert_eq!(doorman.lock().accounts[&held_origin].sockets, 1);
    }
}
