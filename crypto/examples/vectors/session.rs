//! The worked session at the end of PROTOCOL.md: every byte of one, from the genesis to the last record.

use std::fmt::Write as _;

use connect_crypto::{
    handshake::{initiate, receive},
    invite::{HubAddress, Invite, InviteKeys, InviteSeed},
    names::NameKeys,
    transport::Transport,
};
use connect_spec::{
    control::{LOGIN_KIND, Nonce, REDEEM_KIND, proof_text},
    encoding::encode_base64,
    ids::{CredentialId, ServiceId},
    keys::signed_text,
    objects::{Certificate, Credential, CredentialKind, Issuer},
    record::{CloseCode, Progress, Purpose, Record, StreamId},
    trust::Presented,
};

use super::{hex, psk};
use crate::common::{Agent, NOW, TestRng, World, bytes, secret};

use super::insider::keys_of_directions;

/// The heading of the section: everything from there on is written by this program.
pub(crate) const HEADING: &str = "## 26. A worked session\n";

const AUTHORITY: &str = "127.0.0.1:7420";
/// Digits in a line.
const WIDTH: usize = 96;

struct Text(String);

impl Text {
    fn say(&mut self, text: &str) {
        self.0 += "\n";
        self.0 += text;
        self.0 += "\n";
    }

    fn line(&mut self, name: &str, value: &str) {
        let _ = write!(self.0, "\n{name}:\n\n    {value}\n");
    }

    fn bytes(&mut self, name: &str, value: impl AsRef<[u8]>) {
        let digits = hex(&value);
        let plural = if value.as_ref().len() == 1 { "byte" } else { "bytes" };
        let _ = write!(self.0, "\n{name}, {} {plural}:\n\n", value.as_ref().len());
        for start in (0..digits.len()).step_by(WIDTH) {
            let end = digits.len().min(start + WIDTH);
            let _ = writeln!(self.0, "    {}", &digits[start..end]);
        }
    }
}

/// The section, from its heading to the end of the document.
pub(crate) fn section() -> String {
    let mut text = Text(HEADING.to_owned());
    text.say(
        "One session with every byte of it: a workspace, a reacher that joins by an invite, an exposer that the \
         signer certified, a service, one tunnel in base64, one request. Names of values are those of the sections \
         above; all is hexadecimal. It is written by the program that writes the vectors \
         (`cargo run -p connect-crypto --example vectors`), and a test compares it. The keys are published here: \
         use them for nothing.",
    );
    let world = World::named("example");
    let invite = workspace(&mut text, &world);
    let reacher = enrolment(&mut text, &world, &invite);
    let exposer = service(&mut text, &world);
    tunnel(&mut text, &world, &reacher, &exposer);
    text.0
}

fn workspace(text: &mut Text, world: &World) -> Invite {
    text.say("### The workspace");
    text.bytes("`signer` seed", world.signer.seed().as_slice());
    text.bytes("M", world.epoch.realm.as_bytes().as_slice());
    text.bytes("W", world.epoch.names.as_bytes().as_slice());
    text.bytes("`epoch_commit`", world.epoch.commit());
    text.bytes("genesis, its body", world.genesis.body());
    text.bytes("what the signer signs", signed_text("genesis", world.genesis.body()));
    text.bytes("genesis, its envelope", world.genesis.encode());
    text.bytes("`workspace_id`", world.workspace.0);

    text.say("### The invite (sections 6, 7 and 9)");
    let hub: HubAddress = format!("http://{AUTHORITY}").parse().expect("a hub address");
    let seed = InviteSeed::from_bytes(secret("example invite"));
    let tags = vec!["ci".to_owned()];
    let (workspace_id, head) = (world.workspace, world.head());
    let invite = Invite { hub, workspace_id, head, seed, tags, share: None };
    let keys = InviteKeys::derive(&invite.seed);
    text.bytes("seed", invite.seed.as_bytes().as_slice());
    text.bytes("seed of the invite key", keys.signing.seed().as_slice());
    text.bytes("`invite_key`", keys.signing.public().0);
    text.bytes("seed of the invite's wrap key", keys.wrap.seed().as_slice());
    text.bytes("`wrap_key_hash`", keys.wrap.public().hash());
    let attrs = invite.attributes().expect("sound tags");
    text.bytes("salt of the attributes", attrs.salt);
    text.bytes("`attrs`, of the tag `ci`", attrs.hash());
    let credential = credential(world, &invite);
    text.bytes("credential, its envelope", credential.encode());
    text.bytes("hash of the credential", credential.hash());
    let credential_id = CredentialId::of(&keys.signing.public());
    text.bytes("credential id", credential_id.0);
    text.line("the code", &invite.reveal());
    let mut rng = TestRng::new("example wrap");
    let wrap = world.epoch.wrap(&world.workspace, 0, &keys.wrap.public(), &mut rng);
    let wrap = wrap.expect("a sound key");
    let [ephemeral, encapsulation] = rng.draws.as_slice() else { panic!("two draws") };
    text.bytes("ephemeral X25519 secret of the wrap", ephemeral);
    text.bytes("`m` of its ML-KEM encapsulation", encapsulation);
    text.bytes("wrap, of epoch 0", &wrap.sealed.0);
    invite
}

fn credential(world: &World, invite: &Invite) -> connect_spec::signed::Signed<Credential> {
    let keys = InviteKeys::derive(&invite.seed);
    let attrs = invite.attributes().expect("sound tags");
    world.signer.sign(&world.credential(CredentialKind::Invite, &keys, &attrs))
}

fn enrolment(text: &mut Text, world: &World, invite: &Invite) -> Agent {
    let keys = InviteKeys::derive(&invite.seed);
    let nonces = [Nonce(bytes("example hub nonce")), Nonce(bytes("example agent nonce"))];
    let [hub, own] = &nonces;
    text.say("### Joining (sections 9 and 10)");
    text.bytes("nonce of the hub's `challenge`", hub.0);
    text.bytes("`agent_nonce`, here that of `redeem` and of `login`", own.0);
    let subject = CredentialId::of(&keys.signing.public());
    let proof = proof_text(AUTHORITY, hub, own, &subject.0, &world.workspace);
    text.bytes("what `redeem` signs, after the kind", &proof);
    let signature = keys.signing.sign_text(REDEEM_KIND, &proof);
    text.bytes("`signature` of `redeem`, by the invite key", signature.0);

    let credential = credential(world, invite);
    let attrs = invite.attributes().expect("sound tags");
    let identity = connect_crypto::keys::SigningKey::from_seed(secret("example reacher identity"));
    let certificate = keys.signing.sign(&Certificate {
        issuer: Issuer::Credential(credential.hash()),
        ..world.certificate(&identity, &attrs)
    });
    let agent = world.agent("example reacher", identity, attrs, certificate, Some(credential));
    keys_of(text, "reacher", &agent);
    let proof = proof_text(AUTHORITY, hub, own, &agent.id().0, &world.workspace);
    text.bytes("what `login` signs, after the kind", &proof);
    let signature = agent.identity.sign_text(LOGIN_KIND, &proof);
    text.bytes("`signature` of `login`, by the identity key", signature.0);
    agent
}

fn keys_of(text: &mut Text, who: &str, agent: &Agent) {
    let Presented { certificate, noise_key, .. } = &agent.presented;
    text.bytes(&format!("the {who}'s identity seed"), agent.identity.seed().as_slice());
    text.bytes(&format!("the {who}'s static secret"), agent.static_keypair.secret().as_slice());
    text.bytes(&format!("the {who}'s wrap seed"), agent.wrap.seed().as_slice());
    text.bytes(&format!("the {who}'s agent id"), agent.id().0);
    text.bytes(&format!("the {who}'s certificate"), certificate.encode());
    text.bytes(&format!("the {who}'s NoiseKey"), noise_key.encode());
}

fn service(text: &mut Text, world: &World) -> Agent {
    text.say("### The service (section 8)");
    let exposer = world.member("example exposer");
    keys_of(text, "exposer", &exposer);
    text.bytes(
        "salt of the exposer's attributes, for the tags `eu-west` and `prod`",
        exposer.attrs.salt,
    );
    let keys = NameKeys::derive(&world.epoch.names);
    let record = exposer.identity.sign(&world.service_record(&exposer));
    let name = &record.object().name;
    text.bytes("`tag` of `prod-db`", keys.tag(name).0);
    text.bytes("ServiceRecord", record.encode());
    let mut rng = TestRng::new("example names");
    let sealed = keys.seal_service(&record, &mut rng).expect("it fits");
    text.bytes("sealed record, of epoch 0 and counter 7", &sealed.sealed.0);
    let opened =
        keys.open_service(&world.workspace, ServiceId(bytes("service")), exposer.id(), &sealed);
    assert_eq!(opened.as_ref(), Ok(&record));
    exposer
}

fn tunnel(text: &mut Text, world: &World, reacher: &Agent, exposer: &Agent) {
    text.say("### The handshake (section 12)");
    let verified = |agent: &Agent| {
        let presented = agent.presented.clone();
        world.trust.verify_peer(agent.id(), presented, NOW).expect("a member")
    };
    let prologue = world.prologue(reacher, exposer);
    text.bytes("prologue", prologue.encode());
    let (ours, theirs) =
        (&mut TestRng::new("example reacher"), &mut TestRng::new("example exposer"));
    let to = exposer.static_keypair.public();
    let (state, message1) =
        initiate(&world.local(reacher), &prologue, &to, ours).expect("sound keys");
    let received = receive(&exposer.static_keypair, &prologue, &message1).expect("just made");
    let (exposer_end, message2) =
        received.answer(&verified(reacher), &world.local(exposer), theirs).expect("a member asks");
    let reply = state.read(&message2).expect("just made");
    let reacher_end = reply.confirm(&verified(exposer)).expect("a member answers");
    let [kem_seed, ephemeral] = ours.draws.as_slice() else { panic!("two draws") };
    let [encapsulation, answering] = theirs.draws.as_slice() else { panic!("two draws") };
    text.bytes("the reacher's ephemeral ML-KEM seed, `d || z`", kem_seed);
    text.bytes("the reacher's ephemeral X25519 secret", ephemeral);
    text.bytes("message 1", &message1);
    text.bytes("the exposer's ephemeral X25519 secret", answering);
    text.bytes("`m` of its ML-KEM encapsulation", encapsulation);
    let (kem_secret, psk) = psk(world.epoch.realm.as_bytes().as_slice(), kem_seed, &message2);
    text.bytes("`kem_secret`", kem_secret);
    text.bytes("psk", psk);
    text.bytes("message 2, with `ct` before it", &message2);
    text.bytes("handshake hash", reacher_end.handshake_hash());
    let secrets = [ephemeral.as_slice(), answering];
    let [up, down] = keys_of_directions(&prologue, reacher, exposer, secrets, &message1, &psk);
    text.bytes("key from the reacher to the exposer", up);
    text.bytes("key from the exposer to the reacher", down);
    records(text, reacher_end, exposer_end);
}

/// One request and its answer, both ways in the order in which they could travel.
fn records(text: &mut Text, reacher: Transport, exposer: Transport) {
    text.say(
        "### The records (sections 14 to 16)\n\nThe heads are equal, so section 20 adds nothing. Each record as it is, \
         then sealed, then in base64 as the text message that carries it. The last one of the reacher ends the channel; \
         it closes its data socket with 1000.",
    );
    let stream = StreamId::FIRST;
    let fresh = |next_stream| Progress {
        next_stream,
        max_data: 16 << 20,
        received: 0,
        streams: Vec::new(),
        more: false,
    };
    let (request, answer) = (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\nhello\n");
    let [asked, told] = [request.len(), answer.len()].map(|length| length as u64);
    let (up, down) = ("reacher", "exposer");
    let said = [
        (up, "HELLO, new", Record::Hello { new: true, progress: fresh(stream) }),
        (up, "OPEN", Record::Open { stream, purpose: Purpose::Target }),
        (up, "DATA", Record::Data { stream, offset: 0, bytes: request }),
        (up, "FIN", Record::Fin { stream, total: asked }),
        (down, "READY", Record::Ready),
        (down, "WELCOME", Record::Welcome(fresh(stream))),
        (down, "OPENED", Record::Opened(stream)),
        (down, "ACK of everything and FIN", Record::Ack { stream, offset: asked + 1 }),
        (down, "DATA", Record::Data { stream, offset: 0, bytes: answer }),
        (down, "FIN", Record::Fin { stream, total: told }),
        (up, "ACK of everything and FIN", Record::Ack { stream, offset: told + 1 }),
        (up, "CHANNEL_CLOSE", Record::ChannelClose(CloseCode::Normal)),
    ];
    let ((mut reacher_seals, mut reacher_opens), (mut exposer_seals, mut exposer_opens)) =
        (reacher.split(), exposer.split());
    for (who, name, record) in said {
        let mut plain = Vec::new();
        record.encode(&mut plain);
        assert_eq!(Record::decode(&plain).as_ref(), Ok(&record));
        let (sealer, opener) = match who {
            "reacher" => (&mut reacher_seals, &mut exposer_opens),
            _ => (&mut exposer_seals, &mut reacher_opens),
        };
        let mut sealed = plain.clone();
        sealer.seal(&mut sealed, 0).expect("short");
        let opened = opener.open(&mut sealed.clone()).map(|opened| opened.to_vec());
        assert_eq!(opened.as_ref(), Ok(&plain));
        let mut packet = Vec::new();
        encode_base64(&sealed, &mut packet);
        text.bytes(&format!("{who}: {name}"), &plain);
        text.bytes("sealed", &sealed);
        text.line("as text", &String::from_utf8(packet).expect("base64"));
    }
}
