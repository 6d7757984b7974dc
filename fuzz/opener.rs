//! Records of a tunnel whose keys are known: what a peer that holds them can make the other end read.

use std::cell::RefCell;

use connect_crypto::{
    handshake::{initiate, receive},
    transport::{Opener, Sealer, Transport, TransportError},
};
use connect_spec::{
    encoding::{decode_base64, encode_base64},
    limits::{MAX_RECORD_BYTES, TAG_BYTES},
};

use crate::{
    record_decode,
    world::{NOW, TestRng, World},
};

/// Both ends of a tunnel; the same keys each time.
fn transports() -> (Transport, Transport) {
    let world = World::new();
    let (initiator, responder) = (world.member("initiator"), world.member("responder"));
    let prologue = world.prologue(&initiator, &responder);
    let peer = |agent: &crate::world::Agent| {
        world.trust.verify_peer(agent.id(), agent.presented.clone(), NOW).expect("a member")
    };
    let (reply, message1) = initiate(
        &world.local(&initiator),
        &prologue,
        &responder.static_keypair.public(),
        &mut TestRng::new("initiate"),
    )
    .expect("both keys are sound");
    let (theirs, message2) = receive(&responder.static_keypair, &prologue, &message1)
        .and_then(|received| {
            let local = world.local(&responder);
            received.answer(&peer(&initiator), &local, &mut TestRng::new("answer"))
        })
        .expect("an honest message");
    let ours = reply.read(&message2).and_then(|reply| reply.confirm(&peer(&responder)));
    (ours.expect("an honest message"), theirs)
}

fn direction() -> (Sealer, Opener) {
    let (ours, theirs) = transports();
    (ours.split().0, theirs.split().1)
}

thread_local! {
    /// Goes from input to input, as long as everything opens.
    static DIRECTION: RefCell<(Sealer, Opener)> = RefCell::new(direction());
}

/// The first byte says what the others are: the plaintext of a record, or what comes out of a data socket,
/// as a binary or a text message.
pub(crate) fn run(input: &[u8]) {
    let Some((mode, rest)) = input.split_first() else { return };
    DIRECTION.with_borrow_mut(|both| {
        let (sealer, opener) = &mut *both;
        let mut sealed = rest.to_vec();
        if mode % 4 > 1 {
            if mode % 4 == 3 {
                let Ok(record) = decode_base64(&mut sealed) else { return };
                sealed = record.to_vec();
            }
            assert_eq!(opener.open(&mut sealed).err(), Some(TransportError::Open));
            // Nothing opens after that, the next record least of all.
            let mut next = Vec::new();
            sealer.seal(&mut next, 0).expect("it is short");
            assert_eq!(opener.open(&mut next).err(), Some(TransportError::Open));
            *both = direction();
            return;
        }
        if rest.len() > MAX_RECORD_BYTES {
            assert_eq!(sealer.seal(&mut sealed, 0).err(), Some(TransportError::TooLong));
            assert!(sealed.is_empty());
            return;
        }
        sealer.seal(&mut sealed, 0).expect("it fits");
        assert_eq!(sealed.len(), rest.len() + TAG_BYTES);
        if mode % 4 == 1 {
            let mut text = Vec::new();
            encode_base64(&sealed, &mut text);
            sealed = decode_base64(&mut text).expect("a packet of our own").to_vec();
        }
        let opened = opener.open(&mut sealed).expect("it was sealed for this");
        assert_eq!(opened, rest);
        record_decode(opened);
    });
}
