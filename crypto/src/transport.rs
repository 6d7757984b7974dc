//! Sealing and opening records under the keys of a finished handshake. PROTOCOL.md, "Records".
//!
//! The two directions have their own counters and share one snow state, whose ciphers are used by
//! reference only. Keys are wiped when both directions are dropped, which is what a rekey does: it
//! puts the halves of another [`Transport`] in their place.

use std::sync::Arc;

use connect_spec::limits::{MAX_NOISE_BYTES, MAX_RECORD_BYTES, TAG_BYTES};
use snow::{HandshakeState, StatelessTransportState};

use crate::secret::redacted;

/// The keys of a finished handshake.
pub struct Transport {
    keys: Arc<StatelessTransportState>,
    handshake_hash: [u8; 32],
}

impl Transport {
    pub(crate) fn new(noise: HandshakeState) -> Self {
        let mut handshake_hash = [0; 32];
        handshake_hash.copy_from_slice(noise.get_handshake_hash());
        let keys =
            noise.into_stateless_transport_mode().expect("called after the second of two messages");
        Self { keys: Arc::new(keys), handshake_hash }
    }

    /// Hash of everything that both ends saw: equal on both, and on no other tunnel. Not a secret.
    #[must_use]
    pub fn handshake_hash(&self) -> [u8; 32] {
        self.handshake_hash
    }

    /// The two directions, which may go to different owners.
    #[must_use]
    pub fn split(self) -> (Sealer, Opener) {
        let opener = Opener { keys: Some(Arc::clone(&self.keys)), counter: 0 };
        (Sealer { keys: self.keys, counter: 0 }, opener)
    }
}

/// Why a record could not be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// More bytes than one record holds.
    #[error("a record holds at most {MAX_RECORD_BYTES} bytes")]
    TooLong,
    /// Every counter of this key is used.
    #[error("the key of this tunnel is used up")]
    Exhausted,
    /// The record does not open: changed, replayed, reordered, or of another tunnel.
    #[error("record does not open")]
    Open,
}

/// Seals the records of one direction, each under the next counter.
pub struct Sealer {
    keys: Arc<StatelessTransportState>,
    counter: u64,
}

impl Sealer {
    /// Seals `plaintext` into `out`, which is replaced and whose memory is used again.
    ///
    /// # Errors
    /// [`TransportError::TooLong`]; [`TransportError::Exhausted`] when the key is used up: the counter
    /// never wraps. In both cases nothing was sealed and `out` is empty.
    pub fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), TransportError> {
        if plaintext.len() > MAX_RECORD_BYTES {
            out.clear();
            return Err(TransportError::TooLong);
        }
        out.resize(plaintext.len() + TAG_BYTES, 0);
        // snow refuses the last counter, which Noise reserves (section 5.1), and nothing else here.
        if self.keys.write_message(self.counter, plaintext, out).is_err() {
            out.clear();
            return Err(TransportError::Exhausted);
        }
        self.counter += 1;
        Ok(())
    }

    /// How many records were sealed: a driver rekeys long before the counter ends.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.counter
    }
}

/// Opens the records of one direction, each under the next counter.
pub struct Opener {
    /// None once a record did not open.
    keys: Option<Arc<StatelessTransportState>>,
    counter: u64,
}

impl Opener {
    /// Opens `record` into `out`, which is replaced and whose memory is used again.
    ///
    /// # Errors
    /// [`TransportError::Open`], whatever the cause, for this record and for every later one: the
    /// tunnel is over. `out` is empty then.
    pub fn open(&mut self, record: &[u8], out: &mut Vec<u8>) -> Result<(), TransportError> {
        let opened = self.try_open(record, out);
        if opened.is_none() {
            self.keys = None;
            out.clear();
        }
        opened.ok_or(TransportError::Open)
    }

    fn try_open(&mut self, record: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let keys = self.keys.as_ref()?;
        if record.len() > MAX_NOISE_BYTES {
            return None;
        }
        out.resize(record.len().checked_sub(TAG_BYTES)?, 0);
        keys.read_message(self.counter, record, out).ok()?;
        self.counter += 1;
        Some(())
    }

    /// How many records were opened.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.counter
    }
}

redacted!(Transport, Sealer, Opener);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_world::{NOW, TestRng, World};

    fn transports() -> (Transport, Transport) {
        let world = World::new();
        let (initiator, responder) = (world.member("initiator"), world.member("responder"));
        let prologue = world.prologue(&initiator, &responder);
        let (state, message1) = crate::handshake::initiate(
            &world.local(&initiator),
            &prologue,
            &responder.static_keypair.public(),
            &mut TestRng::new("initiate"),
        )
        .unwrap();
        let peer = |agent: &crate::test_world::Agent| {
            world.trust.verify_peer(agent.id(), agent.presented.clone(), NOW).unwrap()
        };
        let (theirs, message2) =
            crate::handshake::receive(&responder.static_keypair, &prologue, &message1)
                .unwrap()
                .answer(&peer(&initiator), &world.local(&responder), &mut TestRng::new("answer"))
                .unwrap();
        (state.read(&message2).unwrap().confirm(&peer(&responder)).unwrap(), theirs)
    }

    fn direction() -> (Sealer, Opener) {
        let (ours, theirs) = transports();
        (ours.split().0, theirs.split().1)
    }

    fn sealed(sealer: &mut Sealer, plaintext: &[u8]) -> Vec<u8> {
        let mut record = Vec::new();
        sealer.seal(plaintext, &mut record).unwrap();
        record
    }

    /// Opens what must not open, and proves that the opener stays dead.
    #[track_caller]
    fn refused(opener: &mut Opener, record: &[u8], next: &[u8]) {
        let mut out = b"older plaintext".to_vec();
        assert_eq!(opener.open(record, &mut out), Err(TransportError::Open));
        assert!(out.is_empty());
        assert_eq!(opener.open(next, &mut out), Err(TransportError::Open));
    }

    #[test]
    fn a_changed_record_kills_the_opener() {
        let length = sealed(&mut direction().0, b"record").len();
        for position in 0..length {
            let (mut sealer, mut opener) = direction();
            let record = sealed(&mut sealer, b"record");
            let mut changed = record.clone();
            changed[position] ^= 1;
            refused(&mut opener, &changed, &record);
        }
    }

    #[test]
    fn replayed_reordered_and_dropped_records_do_not_open() {
        let (mut sealer, mut opener) = direction();
        let (first, second) = (sealed(&mut sealer, b"1"), sealed(&mut sealer, b"2"));
        assert_eq!(opener.open(&first, &mut Vec::new()), Ok(()));
        refused(&mut opener, &first, &second);
        let (mut sealer, mut opener) = direction();
        let (first, second) = (sealed(&mut sealer, b"1"), sealed(&mut sealer, b"2"));
        refused(&mut opener, &second, &first);
    }

    #[test]
    fn truncated_and_extended_records_do_not_open() {
        for length in [0, 1, 15, 16, 21] {
            let (mut sealer, mut opener) = direction();
            let record = sealed(&mut sealer, b"record");
            refused(&mut opener, &record[..length], &record);
        }
        let (mut sealer, mut opener) = direction();
        let record = sealed(&mut sealer, b"record");
        refused(&mut opener, &[record.as_slice(), &[0]].concat(), &record);
    }

    #[test]
    fn a_record_sent_back_does_not_open() {
        let (ours, _) = transports();
        let (mut sealer, mut opener) = ours.split();
        let record = sealed(&mut sealer, b"record");
        refused(&mut opener, &record, &record);
    }

    #[test]
    fn records_have_a_limit_at_both_ends() {
        let (mut sealer, mut opener) = direction();
        let mut out = vec![1];
        let over = vec![0; MAX_RECORD_BYTES + 1];
        assert_eq!(sealer.seal(&over, &mut out), Err(TransportError::TooLong));
        assert!(out.is_empty());
        let largest = sealed(&mut sealer, &over[1..]);
        assert_eq!(opener.open(&largest, &mut out), Ok(()));
        assert_eq!(out.len(), MAX_RECORD_BYTES);
        refused(&mut opener, &vec![0; MAX_NOISE_BYTES + 1], &largest);
    }

    #[test]
    fn the_counter_never_wraps() {
        let (mut sealer, mut opener) = direction();
        (sealer.counter, opener.counter) = (u64::MAX - 1, u64::MAX - 1);
        let last = sealed(&mut sealer, b"last");
        assert_eq!(opener.open(&last, &mut Vec::new()), Ok(()));
        for _ in 0..2 {
            let mut out = vec![1];
            assert_eq!(sealer.seal(b"over", &mut out), Err(TransportError::Exhausted));
            assert!(out.is_empty());
        }
        refused(&mut opener, &last, &last);
    }

    #[test]
    fn records_are_sealed_into_the_same_memory() {
        let (mut sealer, mut opener) = direction();
        let (mut record, mut out) = (Vec::with_capacity(1016), Vec::with_capacity(1000));
        let memory = (record.as_ptr(), out.as_ptr());
        for length in [1000, 3, 0, 1000] {
            sealer.seal(&vec![9; length], &mut record).unwrap();
            opener.open(&record, &mut out).unwrap();
            assert_eq!((record.len(), out.len()), (length + 16, length));
            assert_eq!((record.as_ptr(), out.as_ptr()), memory);
        }
        assert_eq!((sealer.records(), opener.records()), (4, 4));
    }
}
