//! Sealing and opening records under the keys of a finished handshake. PROTOCOL.md, "Records".
//!
//! Records are Noise transport messages (revision 34, section 5.1) without associated data. They are
//! sealed and opened in place, since every byte of every tunnel passes here; that is why the keys are
//! taken out of snow, whose own transport copies. Each direction has a key and a counter of its own
//! and wipes its key when it is dropped, which is what a rekey does to the old ones.

use connect_spec::limits::{MAX_NOISE_BYTES, MAX_RECORD_BYTES, TAG_BYTES};
use snow::HandshakeState;
use zeroize::Zeroizing;

use crate::{resolver::ChaChaPoly, secret::redacted};

/// The highest counter that may be used: Noise reserves the one above (section 5.1).
const LAST_COUNTER: u64 = u64::MAX - 1;

/// The keys of a finished handshake.
pub struct Transport {
    sealing: ChaChaPoly,
    opening: ChaChaPoly,
    handshake_hash: [u8; 32],
}

impl Transport {
    /// Splits (section 5.2) what remains after the second of the two messages.
    pub(crate) fn new(mut noise: HandshakeState) -> Self {
        assert!(noise.is_handshake_finished(), "called after the second of two messages");
        let mut handshake_hash = [0; 32];
        handshake_hash.copy_from_slice(noise.get_handshake_hash());
        let (initiator, responder) = noise.dangerously_get_raw_split();
        let (initiator, responder) = (Zeroizing::new(initiator), Zeroizing::new(responder));
        let (sealing, opening) =
            if noise.is_initiator() { (&initiator, &responder) } else { (&responder, &initiator) };
        Self {
            sealing: ChaChaPoly::new(sealing),
            opening: ChaChaPoly::new(opening),
            handshake_hash,
        }
    }

    /// Hash of everything that both ends saw: equal on both, and on no other tunnel. Not a secret.
    #[must_use]
    pub fn handshake_hash(&self) -> [u8; 32] {
        self.handshake_hash
    }

    /// The two directions, which may go to different owners.
    #[must_use]
    pub fn split(self) -> (Sealer, Opener) {
        let sealer = Sealer { key: self.sealing, counter: 0 };
        (sealer, Opener { key: Some(self.opening), counter: 0 })
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
    key: ChaChaPoly,
    counter: u64,
}

impl Sealer {
    /// Seals what `buffer` holds from `start` on, in place, and appends the tag ([`TAG_BYTES`]).
    ///
    /// # Errors
    /// [`TransportError::TooLong`]; [`TransportError::Exhausted`] when the key is used up: the counter
    /// never wraps. In both cases nothing was sealed and the record is cut off `buffer`, so that it
    /// cannot be sent as it is.
    ///
    /// # Panics
    /// When `start` is beyond the end of `buffer`.
    pub fn seal(&mut self, buffer: &mut Vec<u8>, start: usize) -> Result<(), TransportError> {
        let record = &mut buffer[start..];
        let refused = if record.len() > MAX_RECORD_BYTES {
            TransportError::TooLong
        } else if self.counter > LAST_COUNTER {
            TransportError::Exhausted
        } else {
            let tag = self.key.seal(self.counter, record);
            buffer.extend_from_slice(tag.as_ref());
            self.counter += 1;
            return Ok(());
        };
        buffer.truncate(start);
        Err(refused)
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
    key: Option<ChaChaPoly>,
    counter: u64,
}

impl Opener {
    /// Opens `sealed`, ciphertext and tag, in place, and returns the plaintext in it.
    ///
    /// # Errors
    /// [`TransportError::Open`], whatever the cause, for this record and for every later one: the
    /// tunnel is over. What `sealed` holds then means nothing.
    pub fn open<'s>(&mut self, sealed: &'s mut [u8]) -> Result<&'s mut [u8], TransportError> {
        let fits = (TAG_BYTES..=MAX_NOISE_BYTES).contains(&sealed.len());
        let opened = match &self.key {
            Some(key) if fits && self.counter <= LAST_COUNTER => key.open(self.counter, sealed),
            _ => None,
        };
        if opened.is_some() {
            self.counter += 1;
        } else {
            self.key = None;
        }
        opened.ok_or(TransportError::Open)
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
    use connect_spec::{
        limits::CHANNEL_WINDOW,
        record::{Progress, Purpose, Record, StreamId},
    };

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
        let mut record = plaintext.to_vec();
        sealer.seal(&mut record, 0).unwrap();
        record
    }

    /// Sealed by one who has the key and keeps to no rule.
    fn sealed_under(sealer: &Sealer, counter: u64, plaintext: &[u8]) -> Vec<u8> {
        let mut record = plaintext.to_vec();
        let tag = sealer.key.seal(counter, &mut record);
        record.extend_from_slice(tag.as_ref());
        record
    }

    #[track_caller]
    fn opens(opener: &mut Opener, record: &[u8], plaintext: &[u8]) {
        assert_eq!(opener.open(&mut record.to_vec()).unwrap(), plaintext);
    }

    /// Opens what must not open, and proves that the opener stays dead.
    #[track_caller]
    fn refused(opener: &mut Opener, record: &[u8], next: &[u8]) {
        let counter = opener.records();
        assert_eq!(opener.open(&mut record.to_vec()).err(), Some(TransportError::Open));
        assert_eq!(opener.open(&mut next.to_vec()).err(), Some(TransportError::Open));
        assert_eq!(opener.records(), counter);
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

    /// A bit of each byte of each of the first records, in both directions.
    #[test]
    fn a_bit_flipped_in_any_of_the_first_records_is_refused_and_nothing_of_it_shows() {
        let stream = StreamId::FIRST;
        let progress = Progress {
            next_stream: stream,
            max_data: CHANNEL_WINDOW,
            received: 0,
            streams: Vec::new(),
            more: false,
        };
        let plain = [
            Record::Hello { new: true, progress },
            Record::Open { stream, purpose: Purpose::Target },
            Record::Data { stream, offset: 0, bytes: b"the first bytes of a client" },
            Record::Ping(1),
            Record::Fin { stream, total: 27 },
        ]
        .map(|record| {
            let mut plaintext = Vec::new();
            record.encode(&mut plaintext);
            plaintext
        });
        let directions = [direction, || {
            let (ours, theirs) = transports();
            (theirs.split().0, ours.split().1)
        }];
        for direction in directions {
            for (number, plaintext) in plain.iter().enumerate() {
                for position in 0..plaintext.len() + TAG_BYTES {
                    let (mut sealer, mut opener) = direction();
                    for before in &plain[..number] {
                        let record = sealed(&mut sealer, before);
                        opens(&mut opener, &record, before);
                    }
                    let record = sealed(&mut sealer, plaintext);
                    let mut bent = record.clone();
                    bent[position] ^= 1 << (position % 8);
                    let mut buffer = bent.clone();
                    assert_eq!(opener.open(&mut buffer).err(), Some(TransportError::Open));
                    assert!(!buffer.starts_with(plaintext), "{position}");
                    refused(&mut opener, &bent, &record);
                    assert_eq!(opener.records(), number as u64);
                }
            }
        }
    }

    #[test]
    fn replayed_reordered_and_dropped_records_do_not_open() {
        let (mut sealer, mut opener) = direction();
        let (first, second) = (sealed(&mut sealer, b"1"), sealed(&mut sealer, b"2"));
        opens(&mut opener, &first, b"1");
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
        let over = vec![0; MAX_RECORD_BYTES + 1];
        let mut buffer = [&[7], over.as_slice()].concat();
        assert_eq!(sealer.seal(&mut buffer, 1), Err(TransportError::TooLong));
        assert_eq!(buffer, [7]);
        let largest = sealed(&mut sealer, &over[1..]);
        opens(&mut opener, &largest, &over[1..]);
        let over = sealed_under(&sealer, opener.records(), &over);
        assert_eq!(over.len(), MAX_NOISE_BYTES + 1);
        refused(&mut opener, &over, &largest);
    }

    #[test]
    fn the_counter_never_wraps() {
        let (mut sealer, mut opener) = direction();
        (sealer.counter, opener.counter) = (u64::MAX - 1, u64::MAX - 1);
        let last = sealed(&mut sealer, b"last");
        opens(&mut opener, &last, b"last");
        for _ in 0..2 {
            let mut buffer = b"over".to_vec();
            assert_eq!(sealer.seal(&mut buffer, 0), Err(TransportError::Exhausted));
            assert!(buffer.is_empty());
        }
        let reserved = sealed_under(&sealer, u64::MAX, b"over");
        refused(&mut opener, &reserved, &last);
    }

    #[test]
    fn records_are_sealed_and_opened_in_place() {
        let (mut sealer, mut opener) = direction();
        let mut buffer = Vec::with_capacity(8 + 1000 + TAG_BYTES);
        let memory = buffer.as_ptr();
        for length in [1000, 3, 0, 1000] {
            buffer.clear();
            buffer.extend_from_slice(b"heading.");
            buffer.resize(8 + length, 9);
            sealer.seal(&mut buffer, 8).unwrap();
            assert_eq!((&buffer[..8], buffer.len()), (&b"heading."[..], 8 + length + TAG_BYTES));
            assert_eq!(opener.open(&mut buffer[8..]).unwrap(), vec![9; length]);
            assert_eq!(buffer.as_ptr(), memory);
        }
        assert_eq!((sealer.records(), opener.records()), (4, 4));
    }
}
