//! When the keys of a tunnel are replaced, and which record of that may come when. PROTOCOL.md,
//! "Rekeying".
//!
//! One machine for each end of a tunnel. Handshakes are functions that its owner gives it ([`Role`]), so
//! it sees neither identities nor ciphers. Drive it so: before a record of the channel is taken, ask
//! [`Rekey::poll_transmit`]; after *every* record that is sealed call [`Rekey::sealed`] and seal with
//! what it returns from then on; give *every* record that is opened to [`Rekey::opened`], and open with
//! what it returns from then on.

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use connect_crypto::transport::{Opener, Sealer, Transport};
use connect_spec::{
    limits::{
        MAX_KEY_AGE, MAX_REKEY_ATTEMPTS, REKEY_AFTER, REKEY_AFTER_BYTES, REKEY_AFTER_RECORDS,
        REKEY_RETRY,
    },
    prologue::Prologue,
    record::{CloseCode, Record, RekeyTry, is_rekey},
};

use super::channel::ProtocolViolation;

/// How long, and for how much, keys are used before they are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RekeyAfter {
    time: Duration,
    /// Records of one direction.
    records: u64,
    /// Their bytes, before they are sealed.
    bytes: u64,
}

impl Default for RekeyAfter {
    fn default() -> Self {
        Self { time: REKEY_AFTER, records: REKEY_AFTER_RECORDS, bytes: REKEY_AFTER_BYTES }
    }
}

impl FromStr for RekeyAfter {
    type Err = String;

    /// Reads `seconds=N`, `records=N` and `bytes=N`, separated by commas: for tests. What is not named,
    /// or higher than the default, is the default.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut after = Self::default();
        for part in text.split(',') {
            let wrong = || format!("`{part}` is not seconds=N, records=N or bytes=N");
            let (unit, number) = part.split_once('=').ok_or_else(wrong)?;
            let number: u64 = number.parse().map_err(|_| wrong())?;
            match unit {
                "seconds" => after.time = after.time.min(Duration::from_secs(number)),
                "records" => after.records = after.records.min(number),
                "bytes" => after.bytes = after.bytes.min(number),
                _ => return Err(wrong()),
            }
        }
        Ok(after)
    }
}

/// The keys of a finished handshake, as far as they matter here.
pub(crate) trait Keys {
    type Sealer;
    type Opener;

    /// What the prologue of the next handshake names.
    fn handshake_hash(&self) -> [u8; 32];
    /// The two directions.
    fn split(self) -> (Self::Sealer, Self::Opener);
}

impl Keys for Transport {
    type Sealer = Sealer;
    type Opener = Opener;

    fn handshake_hash(&self) -> [u8; 32] {
        self.handshake_hash()
    }

    fn split(self) -> (Sealer, Opener) {
        self.split()
    }
}

/// What the prologue of a rekey says that the tunnel's first did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Which keys of the tunnel these will be.
    pub(crate) rekey: u32,
    /// Handshake hash of the keys before.
    pub(crate) previous_hash: [u8; 32],
}

impl Place {
    /// The prologue, when `first` is that of the tunnel's first handshake.
    pub(crate) fn prologue(self, first: &Prologue) -> Prologue {
        Prologue { rekey: self.rekey, previous_hash: self.previous_hash, ..first.clone() }
    }
}

/// A handshake that is not to be: the tunnel ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failed {
    /// What the peer is told.
    pub(crate) code: CloseCode,
    /// For this agent's own log.
    pub(crate) why: String,
}

/// Reads message 2 and judges who sent it.
pub(crate) type Finish<K> = Box<dyn FnOnce(&[u8]) -> Result<K, Failed> + Send>;
/// Makes a message 1.
pub(crate) type Initiate<K> = Box<dyn FnMut(Place) -> Result<(Finish<K>, Vec<u8>), Failed> + Send>;
/// Reads a message 1, judges who sent it, and makes the message 2.
pub(crate) type Answer<K> = Box<dyn FnMut(Place, &[u8]) -> Result<Answered<K>, Failed> + Send>;

/// What an exposer made of a message 1.
pub(crate) struct Answered<K> {
    pub(crate) keys: K,
    pub(crate) message2: Vec<u8>,
    /// To be called once a record shows that the peer has the keys too.
    pub(crate) confirmed: Box<dyn FnOnce() + Send>,
}

/// Which end this is, and its half of the handshake.
pub(crate) enum Role<K> {
    /// Begins.
    Reacher(Initiate<K>),
    /// May ask the reacher to begin.
    Exposer(Answer<K>),
}

/// Why the tunnel cannot go on under its keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RekeyEnd {
    /// No others came in time.
    #[error("its keys were not replaced within {} s", MAX_KEY_AGE.as_secs())]
    TooOld,
    /// The handshake did not succeed; the peer was told.
    #[error("its keys were not replaced: {0}")]
    Failed(String),
}

/// What to do with a record that was opened.
pub(crate) enum Opened<K: Keys> {
    /// It is for the channel.
    ForChannel,
    /// It was for this machine.
    Taken,
    /// It was the peer's last under the old key: the next ones open with this.
    Switched(K::Opener),
}

/// The state machine.
pub(crate) struct Rekey<K: Keys> {
    role: Role<K>,
    after: RekeyAfter,
    /// Which keys of the tunnel are in use, or still are in one direction.
    number: u32,
    /// Their handshake hash.
    hash: [u8; 32],
    phase: Phase<K>,
    /// The exposer asked for the next keys.
    asked: bool,
    /// When the key that this side seals with was made.
    made: Instant,
    sealed: Used,
    opened: Used,
    /// The record that is sealed next is SWITCH.
    switching: bool,
    /// The tunnel is to end; `true` once the peer was told.
    failed: Option<(Failed, bool)>,
}

/// What one direction carried under its key.
#[derive(Debug, Clone, Copy, Default)]
struct Used {
    records: u64,
    bytes: u64,
}

impl Used {
    fn add(&mut self, bytes: usize) {
        self.records += 1;
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }
}

enum Phase<K: Keys> {
    /// Both directions are under the same keys, and no handshake was begun.
    Settled,
    /// Reacher: HS1 was sent, once for each of these, the last one then.
    Begun { tries: Vec<Finish<K>>, last: Instant },
    /// Reacher: a HS2 is good; SWITCH is next.
    Agreed(Next<K>, Tries),
    /// Reacher: SWITCH was sent. The exposer's is awaited.
    Sent(Pending<K>, Tries),
    /// Exposer: HS1 came; each is answered, in order.
    Answering { answers: Vec<(Next<K>, Unsaid)>, said: u8 },
    /// Exposer: the reacher's SWITCH came. A record under its new key is awaited, then SWITCH is next.
    Confirming { next: NextSealer<K>, confirmed: Option<Box<dyn FnOnce() + Send>> },
}

/// Keys that are not used yet.
struct Next<K: Keys> {
    attempt: u8,
    made: Instant,
    hash: [u8; 32],
    sealer: K::Sealer,
    opener: K::Opener,
}

impl<K: Keys> Next<K> {
    fn new(attempt: u8, made: Instant, keys: K) -> Self {
        let hash = keys.handshake_hash();
        let (sealer, opener) = keys.split();
        Self { attempt, made, hash, sealer, opener }
    }
}

/// What an exposer has yet to say and do about its answer.
struct Unsaid {
    message2: Vec<u8>,
    confirmed: Box<dyn FnOnce() + Send>,
}

/// The direction to the reacher, when the one from it was switched already.
struct NextSealer<K: Keys> {
    attempt: u8,
    made: Instant,
    hash: [u8; 32],
    sealer: K::Sealer,
}

/// The direction from the exposer, when the one to it was switched already.
struct Pending<K: Keys> {
    attempt: u8,
    hash: [u8; 32],
    opener: K::Opener,
}

/// How many handshakes a reacher began, and the next one of which an answer may come: answers to those
/// after the one that it uses may still be on their way.
#[derive(Debug, Clone, Copy)]
struct Tries {
    begun: u8,
    next: u8,
}

impl<K: Keys> Rekey<K> {
    /// Begins with the first keys of a tunnel, made `now` by the handshake with this hash.
    ///
    /// `random` is uniform over all of `u32`: by it a reacher is up to a tenth early, so that tunnels
    /// that began together do not all rekey together.
    pub(crate) fn new(
        role: Role<K>,
        mut after: RekeyAfter,
        random: u32,
        now: Instant,
        hash: [u8; 32],
    ) -> Self {
        if matches!(role, Role::Reacher(_)) {
            let early = f64::from(random) / f64::from(u32::MAX) / 10.0;
            after.time = after.time.mul_f64(1.0 - early);
        }
        Self {
            role,
            after,
            number: 0,
            hash,
            phase: Phase::Settled,
            asked: false,
            made: now,
            sealed: Used::default(),
            opened: Used::default(),
            switching: false,
            failed: None,
        }
    }

    /// Appends the next record of a rekey to seal and send to `record`; false when there is none.
    ///
    /// `greeted`: the greeting of the channel is over, and its last record sent. Nothing else may be
    /// sent before.
    ///
    /// # Errors
    /// [`RekeyEnd`]: nothing more may be sealed, and the tunnel is over.
    pub(crate) fn poll_transmit(
        &mut self,
        now: Instant,
        greeted: bool,
        record: &mut Vec<u8>,
    ) -> Result<bool, RekeyEnd> {
        if now >= self.made + MAX_KEY_AGE {
            return Err(RekeyEnd::TooOld);
        }
        if greeted && self.failed.is_none() {
            match self.transmit(now, record) {
                Ok(transmitted) => return Ok(transmitted),
                Err(failed) => self.failed = Some((failed, false)),
            }
        }
        match &mut self.failed {
            Some((failed, true)) => Err(RekeyEnd::Failed(failed.why.clone())),
            Some((failed, told)) => {
                *told = true;
                Record::TunnelClose(failed.code).encode(record);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn transmit(&mut self, now: Instant, record: &mut Vec<u8>) -> Result<bool, Failed> {
        let due = self.is_due(now);
        // After the last number, nothing replaces the keys: the tunnel ends with them.
        let Some(number) = self.number.checked_add(1) else {
            return Ok(false);
        };
        let rekey = |attempt| RekeyTry { number, attempt };
        let place = Place { rekey: number, previous_hash: self.hash };
        let outgoing = match (&mut self.phase, &mut self.role) {
            (Phase::Settled, Role::Reacher(initiate)) if due || self.asked => {
                let (finish, message) = initiate(place)?;
                self.phase = Phase::Begun { tries: vec![finish], last: now };
                Record::Hs1 { rekey: rekey(0), message: &message }.encode(record);
                return Ok(true);
            }
            (Phase::Settled, Role::Exposer(_)) if due && !self.asked => {
                self.asked = true;
                Record::HsWant(number)
            }
            (Phase::Begun { tries, last }, Role::Reacher(initiate)) => {
                let begun = count(tries);
                if begun >= MAX_REKEY_ATTEMPTS || now < *last + REKEY_RETRY {
                    return Ok(false);
                }
                let (finish, message) = initiate(place)?;
                tries.push(finish);
                *last = now;
                Record::Hs1 { rekey: rekey(begun), message: &message }.encode(record);
                return Ok(true);
            }
            (Phase::Agreed(next, _), _) => Record::Switch(rekey(next.attempt)),
            (Phase::Answering { answers, said }, _) => {
                let Some((next, unsaid)) = answers.get(usize::from(*said)) else {
                    return Ok(false);
                };
                *said += 1;
                Record::Hs2 { rekey: rekey(next.attempt), message: &unsaid.message2 }
            }
            (Phase::Confirming { next, confirmed: None }, _) => Record::Switch(rekey(next.attempt)),
            // So that the exposer gets a record under the new key. Pings of channels count from 1.
            (Phase::Sent(..), _) if self.sealed.records == 0 => Record::Ping(0),
            (
                Phase::Settled
                | Phase::Begun { .. }
                | Phase::Sent(..)
                | Phase::Confirming { confirmed: Some(_), .. },
                _,
            ) => return Ok(false),
        };
        self.switching = matches!(outgoing, Record::Switch(_));
        outgoing.encode(record);
        Ok(true)
    }

    /// Says that a record of so many bytes was sealed: the one of [`Rekey::poll_transmit`] if that had
    /// one, or any other. After SWITCH, returns what to seal with from then on.
    pub(crate) fn sealed(&mut self, bytes: usize) -> Option<K::Sealer> {
        self.sealed.add(bytes);
        if !std::mem::take(&mut self.switching) {
            return None;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Settled);
        if let Phase::Agreed(next, tries) = phase {
            let Next { attempt, made, hash, sealer, opener } = next;
            self.phase = Phase::Sent(Pending { attempt, hash, opener }, tries);
            (self.made, self.sealed) = (made, Used::default());
            Some(sealer)
        } else if let Phase::Confirming { next, confirmed: None } = phase {
            (self.made, self.sealed) = (next.made, Used::default());
            self.settle(next.hash);
            Some(next.sealer)
        } else {
            // Only this machine makes a SWITCH, and only in those two.
            self.phase = phase;
            None
        }
    }

    /// Takes a record that was opened. Call [`Rekey::poll_transmit`] afterwards.
    ///
    /// `greeted`: the greeting of the channel is over.
    ///
    /// # Errors
    /// A record that may not come now; the channel is to be closed.
    pub(crate) fn opened(
        &mut self,
        now: Instant,
        greeted: bool,
        record: &[u8],
    ) -> Result<Opened<K>, ProtocolViolation> {
        self.opened.add(record.len());
        if let Phase::Confirming { confirmed, .. } = &mut self.phase
            && let Some(confirmed) = confirmed.take()
        {
            confirmed();
        }
        if !is_rekey(record) || self.failed.is_some() {
            return Ok(if is_rekey(record) { Opened::Taken } else { Opened::ForChannel });
        }
        // The channel refuses what is malformed, and what comes before the greeting is over.
        let (true, Ok(record)) = (greeted, Record::decode(record)) else {
            return Ok(Opened::ForChannel);
        };
        if let Record::HsWant(number) = record {
            self.wanted(number)?;
        } else if let Record::Hs1 { rekey, message } = record {
            self.handle_hs1(now, rekey, message)?;
        } else if let Record::Hs2 { rekey, message } = record {
            self.handle_hs2(now, rekey, message)?;
        } else if let Record::Switch(rekey) = record {
            return self.handle_switch(rekey).map(Opened::Switched);
        }
        Ok(Opened::Taken)
    }

    fn wanted(&mut self, number: u32) -> Result<(), ProtocolViolation> {
        let reacher = matches!(self.role, Role::Reacher(_));
        let in_turn = matches!(self.phase, Phase::Settled | Phase::Begun { .. });
        if !reacher || !in_turn || !self.is_next(number) || self.asked {
            return Err(ProtocolViolation("a rekey asked for out of turn"));
        }
        self.asked = true;
        Ok(())
    }

    fn handle_hs1(
        &mut self,
        now: Instant,
        rekey: RekeyTry,
        message: &[u8],
    ) -> Result<(), ProtocolViolation> {
        const VIOLATION: ProtocolViolation = ProtocolViolation("a rekey begun out of turn");
        let is_next = self.is_next(rekey.number);
        let place = Place { rekey: rekey.number, previous_hash: self.hash };
        let Role::Exposer(answer) = &mut self.role else {
            return Err(VIOLATION);
        };
        if matches!(self.phase, Phase::Settled) {
            self.phase = Phase::Answering { answers: Vec::new(), said: 0 };
        }
        let Phase::Answering { answers, .. } = &mut self.phase else {
            return Err(VIOLATION);
        };
        if !is_next || answers.len() != usize::from(rekey.attempt) {
            return Err(VIOLATION);
        }
        match answer(place, message) {
            Ok(Answered { keys, message2, confirmed }) => {
                let next = Next::new(rekey.attempt, now, keys);
                answers.push((next, Unsaid { message2, confirmed }));
            }
            Err(failed) => self.failed = Some((failed, false)),
        }
        Ok(())
    }

    fn handle_hs2(
        &mut self,
        now: Instant,
        rekey: RekeyTry,
        message: &[u8],
    ) -> Result<(), ProtocolViolation> {
        const VIOLATION: ProtocolViolation = ProtocolViolation("an answer to no rekey");
        if !self.is_next(rekey.number) {
            return Err(VIOLATION);
        }
        match &mut self.phase {
            Phase::Begun { tries, .. } if rekey.attempt < count(tries) => {
                let begun = count(tries);
                let finish = tries.swap_remove(usize::from(rekey.attempt));
                match finish(message) {
                    Ok(keys) => {
                        let next = Next::new(rekey.attempt, now, keys);
                        let tries = Tries { begun, next: rekey.attempt + 1 };
                        self.phase = Phase::Agreed(next, tries);
                    }
                    Err(failed) => self.failed = Some((failed, false)),
                }
                Ok(())
            }
            // The first answer is the one that counts.
            Phase::Agreed(_, tries) | Phase::Sent(_, tries)
                if (tries.next..tries.begun).contains(&rekey.attempt) =>
            {
                tries.next = rekey.attempt + 1;
                Ok(())
            }
            Phase::Settled
            | Phase::Begun { .. }
            | Phase::Agreed(..)
            | Phase::Sent(..)
            | Phase::Answering { .. }
            | Phase::Confirming { .. } => Err(VIOLATION),
        }
    }

    fn handle_switch(&mut self, rekey: RekeyTry) -> Result<K::Opener, ProtocolViolation> {
        const VIOLATION: ProtocolViolation = ProtocolViolation("a switch to no key");
        let is_agreed = match &self.phase {
            Phase::Sent(pending, _) => pending.attempt == rekey.attempt,
            // What was not said yet cannot be known.
            Phase::Answering { said, .. } => rekey.attempt < *said,
            Phase::Settled | Phase::Begun { .. } | Phase::Agreed(..) | Phase::Confirming { .. } => {
                false
            }
        };
        if !is_agreed || !self.is_next(rekey.number) {
            return Err(VIOLATION);
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Settled);
        let opener = if let Phase::Answering { mut answers, .. } = phase {
            let (next, Unsaid { confirmed, .. }) = answers.swap_remove(rekey.attempt.into());
            let Next { attempt, made, hash, sealer, opener } = next;
            let next = NextSealer { attempt, made, hash, sealer };
            self.phase = Phase::Confirming { next, confirmed: Some(confirmed) };
            opener
        } else if let Phase::Sent(pending, _) = phase {
            self.settle(pending.hash);
            pending.opener
        } else {
            return Err(VIOLATION);
        };
        self.opened = Used::default();
        Ok(opener)
    }

    /// Both directions are under the next keys.
    fn settle(&mut self, hash: [u8; 32]) {
        self.number += 1;
        self.hash = hash;
        self.asked = false;
        self.phase = Phase::Settled;
    }

    fn is_next(&self, number: u32) -> bool {
        self.number.checked_add(1) == Some(number)
    }

    fn is_due(&self, now: Instant) -> bool {
        let worn =
            |used: Used| used.records >= self.after.records || used.bytes >= self.after.bytes;
        now >= self.made + self.after.time || worn(self.sealed) || worn(self.opened)
    }

    /// Whether [`Rekey::poll_transmit`] has something, or an end.
    #[cfg(test)]
    fn wants_transmit(&self, now: Instant) -> bool {
        if self.failed.is_some() || now >= self.made + MAX_KEY_AGE {
            return true;
        }
        match &self.phase {
            Phase::Settled => match self.role {
                Role::Reacher(_) => self.asked || self.is_due(now),
                Role::Exposer(_) => !self.asked && self.is_due(now),
            },
            Phase::Begun { tries, last } => {
                count(tries) < MAX_REKEY_ATTEMPTS && now >= *last + REKEY_RETRY
            }
            Phase::Agreed(..) | Phase::Confirming { confirmed: None, .. } => true,
            Phase::Sent(..) => self.sealed.records == 0,
            Phase::Answering { answers, said } => usize::from(*said) < answers.len(),
            Phase::Confirming { confirmed: Some(_), .. } => false,
        }
    }

    /// When [`Rekey::poll_transmit`] is to be called, if nothing happens before. `greeted` as there.
    pub(crate) fn poll_timeout(&self, greeted: bool) -> Instant {
        let end = self.made + MAX_KEY_AGE;
        let exposer = matches!(self.role, Role::Exposer(_));
        match &self.phase {
            // Before the greeting nothing is begun, and after the last number nothing ever is.
            _ if !greeted || self.number == u32::MAX => end,
            Phase::Settled if exposer && self.asked => end,
            Phase::Settled => end.min(self.made + self.after.time),
            Phase::Begun { tries, last } if count(tries) < MAX_REKEY_ATTEMPTS => {
                end.min(*last + REKEY_RETRY)
            }
            Phase::Begun { .. }
            | Phase::Agreed(..)
            | Phase::Sent(..)
            | Phase::Answering { .. }
            | Phase::Confirming { .. } => end,
        }
    }
}

fn count<K>(tries: &[Finish<K>]) -> u8 {
    u8::try_from(tries.len()).expect("at most MAX_REKEY_ATTEMPTS")
}

#[cfg(test)]
mod tests;
