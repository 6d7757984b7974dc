//! Workspaces, held apart: what an agent of B can do to A with a client made by hand, and tickets in the
//! wrong hands.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use connect_crypto::{
    epoch::EpochSecrets,
    invite::{InviteKeys, InviteSeed},
};
use connect_spec::{
    audit::{ApiKeyId, Scope},
    bytes::Blob,
    control::{
        self, AddressedWrap, ApiKey, CreateWorkspace, EpochWrap, ErrorCode, FromAgent, FromHub,
        LOGIN_KIND, Nonce, REDEEM_KIND, Recipient, Redeem, Reply, Request, SessionKind, close,
    },
    encoding::Encoding,
    ids::{AgentId, CredentialId, LookupTag, ServiceId, TunnelId, WorkspaceId},
    log::{Beat, EntryHash, Head, LogEntry},
    objects::{AgentRole, Credential, CredentialKind},
    signed::Signed,
};
use connect_tests::{
    client::{Client, Keys, data_socket, rng, sealed, tickets, tunnel_request},
    home::{Pair, Workspace},
    hub::Hub,
    process::Process,
    runtime,
    services::Service,
};
use futures_util::StreamExt;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::sleep,
};
use tokio_tungstenite::tungstenite::Message;

/// Workspace A with an exposed service, and an agent of workspace B with a client made by hand.
struct Stage {
    a: Workspace,
    a_keys: Keys,
    a_service: ServiceId,
    service: Service,
    probed: usize,
    b_keys: Keys,
    hub: SocketAddr,
    b: Workspace,
    _agent: Process,
}

impl Stage {
    fn set() -> Self {
        let hub = Hub::shared();
        let (a, b) = (Workspace::found(hub), Workspace::found(hub));
        let agent = a.founder.up();
        let service = Service::echo();
        let exposed =
            a.founder.json(&["expose", &service.address().to_string(), "--name", "prod-db"]);
        let a_service = exposed["service_id"].as_str().and_then(|id| id.parse().ok());
        Self {
            a_keys: Keys::of(&a.founder),
            b_keys: Keys::of(&b.founder),
            a_service: a_service.expect("an id"),
            probed: service.probed(),
            service,
            hub: hub.address(),
            a,
            b,
            _agent: agent,
        }
    }

    /// What B's agent is answered.
    fn ask(&self, request: Request) -> Reply {
        runtime().block_on(async {
            let mut client = Client::login(self.hub, &self.b_keys, SessionKind::Agent).await;
            client.request(request).await
        })
    }

    /// The service of A is where it was, and works.
    #[track_caller]
    fn check_unharmed(&self) {
        let listed = self.a.founder.json(&["services"]);
        let listed = listed.as_array().expect("a list");
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0]["service_id"], self.a_service.to_string());
        assert_eq!(listed[0]["online"], true);
        assert_eq!(self.service.accepted(), self.probed, "the target was dialled");
        self.a.founder.reach("prod-db");
    }
}

fn refused_with(reply: &Reply, expected: ErrorCode) -> bool {
    matches!(reply, Reply::Error(report) if report.code == expected)
}

#[test]
fn other_workspace_sees_no_service_and_no_agent() {
    let stage = Stage::set();
    let tag = stage.a_keys.names.tag(&"prod-db".parse().expect("a name"));
    let reply = stage.ask(Request::Lookup { tag });
    assert!(matches!(&reply, Reply::Services { services, .. } if services.is_empty()), "{reply:?}");
    for after in [None, Some(ServiceId([0; 16]))] {
        let reply = stage.ask(Request::Services { after });
        assert!(
            matches!(&reply, Reply::Services { services, more: false } if services.is_empty()),
            "{reply:?}"
        );
    }
    for after in [None, Some(AgentId([0; 16]))] {
        let reply = stage.ask(Request::Agents { after });
        let Reply::Agents { agents, more: false } = reply else {
            panic!("{reply:?}");
        };
        let ids: Vec<_> = agents.iter().map(|agent| agent.agent_id).collect();
        assert_eq!(ids, [stage.b_keys.agent_id]);
    }
    stage.check_unharmed();
}

#[test]
fn other_workspace_opens_no_tunnel_and_learns_nothing_by_trying() {
    let stage = Stage::set();
    let (service, agent) = (stage.a_service, stage.a_keys.agent_id);
    let there = stage.ask(Request::OpenTunnel(tunnel_request(service, agent)));
    let nowhere =
        stage.ask(Request::OpenTunnel(tunnel_request(ServiceId([8; 16]), AgentId([8; 16]))));
    // Word for word what is said of a service that nobody has.
    assert!(refused_with(&there, ErrorCode::NotFound), "{there:?}");
    assert_eq!(there, nowhere);
    for (service, agent) in [(service, stage.b_keys.agent_id), (ServiceId([8; 16]), agent)] {
        let reply = stage.ask(Request::OpenTunnel(tunnel_request(service, agent)));
        assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
    }
    stage.check_unharmed();
}

#[test]
fn other_workspace_changes_nothing() {
    let stage = Stage::set();
    let tag = stage.a_keys.names.tag(&"prod-db".parse().expect("a name"));
    // The same ids in another workspace are other things, and not A's.
    let reply = stage.ask(Request::Expose {
        service_id: stage.a_service,
        tag,
        record: sealed(u32::MAX),
        take_over: true,
    });
    assert!(matches!(reply, Reply::Done | Reply::Error(_)), "{reply:?}");
    stage.check_unharmed();
    stage.ask(Request::Unexpose { service_id: stage.a_service });
    let reply = stage.ask(Request::PublishAgent { record: sealed(u32::MAX) });
    assert_eq!(reply, Reply::Done);
    stage.check_unharmed();
    let agents = stage.a.founder.json(&["agents"]);
    assert_eq!(agents[0]["label"], "founder");
}

#[test]
fn credential_of_another_workspace_is_refused() {
    let stage = Stage::set();
    let keys = InviteKeys::derive(&InviteSeed::generate(&mut rng()));
    let create = |credential: Credential, signer: &Keys| {
        let signer = signer.signer.as_ref().expect("a founder's");
        let epoch = EpochSecrets::generate(&mut rng());
        let wrap_key = keys.wrap.public();
        let wrap =
            epoch.wrap(&credential.workspace_id, 0, &wrap_key, &mut rng()).expect("a sound key");
        stage.ask(Request::CreateCredential {
            credential: Blob(signer.sign(&credential).encode()),
            wrap_key: Blob(wrap_key.encode()),
            wrap,
        })
    };
    let of = |workspace: &Keys, issuer: &Keys| Credential {
        workspace_id: workspace.workspace_id,
        kind: CredentialKind::Invite,
        invite_key: keys.signing.public(),
        role: AgentRole::Member,
        attrs: workspace.attrs.hash(),
        services: None,
        uses: 1,
        join_until: u64::from(u32::MAX),
        certs_end: u64::from(u32::MAX),
        issuer: issuer.signer.as_ref().expect("a founder's").public(),
        wrap_key_hash: keys.wrap.public().hash(),
    };
    let (a, b) = (&stage.a_keys, &stage.b_keys);
    for (credential, signer) in [
        // A's own, brought by B; B's for A; A's for B; B's signed by A's key.
        (of(a, a), a),
        (of(a, b), b),
        (of(b, a), a),
        (of(b, b), a),
    ] {
        let reply = create(credential, signer);
        assert!(
            refused_with(&reply, ErrorCode::Forbidden)
                || refused_with(&reply, ErrorCode::BadRequest),
            "{reply:?}"
        );
    }
}

#[test]
fn login_needs_the_whole_chain_and_a_fresh_proof() {
    let stage = Stage::set();
    let (a, b) = (&stage.a_keys, &stage.b_keys);
    let attempt = |change: &dyn Fn(&mut connect_spec::control::Login, &Nonce)| {
        runtime().block_on(async {
            let mut client = Client::dial(stage.hub).await;
            let nonce = client.nonce;
            let mut login = b.login(stage.hub, &nonce, SessionKind::Command);
            change(&mut login, &nonce);
            client.send(&FromAgent::Login(Box::new(login))).await;
            let answer = client.next().await;
            assert!(matches!(answer, Some(FromHub::Error(_))), "{answer:?}");
            client.close_code().await
        })
    };
    // B's objects in A; A's objects with B's proof; a proof for another hub, moment or kind.
    type Change<'c> = &'c dyn Fn(&mut connect_spec::control::Login, &Nonce);
    let changes: [Change<'_>; 7] = [
        &|login, _| login.workspace_id = a.workspace_id,
        &|login, nonce| {
            let theirs = a.login(stage.hub, nonce, SessionKind::Command);
            login.presented = theirs.presented;
            login.workspace_id = a.workspace_id;
            login.wrap_key = theirs.wrap_key;
        },
        &|login, _| login.presented.noise_key = a.presented.to_blobs().noise_key,
        &|login, _| {
            *login = b.login(stage.hub, &Nonce([0; 32]), SessionKind::Command);
        },
        &|login, nonce| {
            let other = "127.0.0.1:1".parse().expect("an address");
            let signature = b.login(other, nonce, SessionKind::Command).signature;
            login.signature = signature;
        },
        &|login, nonce| {
            *login = b.login("192.0.2.1:7420".parse().expect("an address"), nonce, login.session);
        },
        &|login, _| login.signature.0[0] ^= 1,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        assert_eq!(attempt(change), Some(close::UNAUTHORIZED), "change {number}");
    }
    stage.check_unharmed();
}

#[test]
fn nothing_is_answered_before_the_login() {
    let hub = Hub::shared().address();
    for request in [
        Request::Services { after: None },
        Request::Agents { after: None },
        Request::OpenTunnel(tunnel_request(ServiceId([0; 16]), AgentId([0; 16]))),
    ] {
        runtime().block_on(async {
            let mut client = Client::dial(hub).await;
            client.send(&FromAgent::Request { id: 1, request }).await;
            let answer = client.next().await;
            assert!(matches!(answer, Some(FromHub::Error(_))), "{answer:?}");
            assert_eq!(client.close_code().await, Some(close::BAD_REQUEST));
        });
    }
}

/// Ids of workspace A, or ones that are nowhere.
struct Ids {
    workspace: WorkspaceId,
    agent: AgentId,
    service: ServiceId,
    tag: LookupTag,
    credential: CredentialId,
    head: Head,
    entries: Vec<Blob>,
    certificate: Blob,
    signed_credential: Blob,
    beat: Blob,
    api_key: ApiKeyId,
}

/// The same id but for its last byte, so that it sorts where the other one does.
fn beside<const N: usize>(id: [u8; N], probe: u8) -> [u8; N] {
    let mut id = id;
    id[N - 1] ^= probe.max(1);
    id
}

impl Ids {
    /// Those of A, taken from its agent's own view.
    async fn of_a(stage: &Stage) -> Self {
        let a = &stage.a_keys;
        let mut client = Client::login(stage.hub, a, SessionKind::Command).await;
        let Reply::Credentials { credentials, .. } =
            client.request(Request::Credentials { after: None }).await
        else {
            panic!("A has an invite");
        };
        let signed_credential = credentials.first().expect("A has an invite").credential.clone();
        let credential: Signed<Credential> =
            Signed::decode(&signed_credential.0).expect("what the hub verified");
        let Reply::Log { entries, .. } = client.request(Request::Log { have: Vec::new() }).await
        else {
            panic!("A has a log");
        };
        let (_, api_key) = new_api_key(&mut client, Duration::from_secs(3600)).await;
        Self {
            workspace: a.workspace_id,
            agent: a.agent_id,
            service: stage.a_service,
            tag: a.names.tag(&"prod-db".parse().expect("a name")),
            credential: credential.object().id(),
            head: a.trust.head(),
            entries,
            certificate: Blob(a.presented.certificate.encode()),
            signed_credential,
            beat: beat(a, a.workspace_id, a.agent_id),
            api_key,
        }
    }

    /// As well-formed, and nobody's.
    fn nowhere(&self, a: &Keys, probe: u8) -> Self {
        let signer = a.signer.as_ref().expect("a founder's");
        let workspace = WorkspaceId(beside(self.workspace.0, probe));
        let mut certificate = a.presented.certificate.object().clone();
        certificate.workspace_id = workspace;
        let credential: Signed<Credential> =
            Signed::decode(&self.signed_credential.0).expect("sound");
        let mut credential = credential.object().clone();
        credential.workspace_id = workspace;
        let entries = self.entries.iter().map(|wire| {
            let LogEntry::Entry(entry) = LogEntry::decode(&wire.0).expect("sound") else {
                panic!("nothing was recovered");
            };
            let mut entry = entry.object().clone();
            entry.workspace_id = workspace;
            Blob(LogEntry::Entry(signer.sign(&entry)).encode())
        });
        let agent = AgentId(beside(self.agent.0, probe));
        Self {
            workspace,
            agent,
            service: ServiceId(beside(self.service.0, probe)),
            tag: LookupTag(beside(self.tag.0, probe)),
            credential: CredentialId(beside(self.credential.0, probe)),
            head: Head { hash: EntryHash(beside(self.head.hash.0, probe)), ..self.head },
            entries: entries.collect(),
            certificate: Blob(signer.sign(&certificate).encode()),
            signed_credential: Blob(signer.sign(&credential).encode()),
            beat: beat(a, workspace, agent),
            api_key: ApiKeyId(beside(self.api_key.0, probe)),
        }
    }

    /// Every request that can name something, by a member of B.
    fn requests(&self, b: &Keys) -> Vec<Request> {
        let wrap = || EpochWrap { epoch: 0, sealed: Blob(vec![5; 64]) };
        let store = |recipient| Request::StoreWraps {
            wraps: vec![AddressedWrap { recipient, wrap: wrap() }],
        };
        let open = |service, agent| Request::OpenTunnel(tunnel_request(service, agent));
        vec![
            Request::Lookup { tag: self.tag },
            Request::Services { after: Some(self.service) },
            Request::Agents { after: Some(self.agent) },
            Request::Credentials { after: Some(self.credential) },
            open(self.service, self.agent),
            open(self.service, b.agent_id),
            open(ServiceId([8; 16]), self.agent),
            Request::Unexpose { service_id: self.service },
            Request::Expose {
                service_id: self.service,
                tag: self.tag,
                record: sealed(1),
                take_over: true,
            },
            Request::Unexpose { service_id: self.service },
            Request::Log { have: vec![self.head] },
            Request::Append { entries: self.entries.clone() },
            Request::Beats { mine: Some(self.beat.clone()) },
            store(Recipient::Agent(self.agent)),
            store(Recipient::Credential(self.credential)),
            Request::Certify { certificate: self.certificate.clone() },
            Request::RevokeApiKey { key_id: self.api_key },
            Request::CreateCredential {
                credential: self.signed_credential.clone(),
                wrap_key: Blob(b.wrap.public().encode()),
                wrap: wrap(),
            },
        ]
    }
}

/// A key that may do everything.
async fn new_api_key(client: &mut Client, valid_for: Duration) -> (ApiKey, ApiKeyId) {
    let scopes = vec![Scope::Read, Scope::Audit, Scope::Write];
    let valid_for = valid_for.as_secs();
    let reply = client.request(Request::CreateApiKey { scopes, valid_for }).await;
    let Reply::ApiKeyCreated { key, key_id, .. } = reply else {
        panic!("{reply:?}");
    };
    (key, key_id)
}

async fn api_keys(client: &mut Client) -> BTreeSet<String> {
    let Reply::ApiKeys { keys } = client.request(Request::ApiKeys).await else {
        panic!("members list keys");
    };
    keys.iter().map(|key| key.key_id.to_string()).collect()
}

fn beat(keys: &Keys, workspace_id: WorkspaceId, agent_id: AgentId) -> Blob {
    let beat = Beat { workspace_id, agent_id, head: keys.trust.head(), time: 1_700_000_000 };
    Blob(keys.signing.sign(&beat).encode())
}

/// What B says to get into a workspace that it is no member of: everything that it can sign itself.
fn intrusion(
    b: &Keys,
    genesis: &Blob,
    hub: SocketAddr,
    nonce: &Nonce,
    workspace: WorkspaceId,
    kind: usize,
) -> FromAgent {
    let (authority, agent_nonce) = (hub.to_string(), Nonce([7; 32]));
    let agent_id = AgentId::of(&workspace, &b.signing.public());
    let proof = |kind, id: &[u8; 16]| {
        let text = control::proof_text(&authority, nonce, &agent_nonce, id, &workspace);
        b.signing.sign_text(kind, &text)
    };
    if kind == 0 {
        let invite_key = b.signing.public();
        let id = CredentialId::of(&invite_key);
        return FromAgent::Redeem(Redeem {
            signature: proof(REDEEM_KIND, id.as_bytes()),
            invite_key,
            authority: authority.clone(),
            agent_nonce,
            workspace_id: workspace,
        });
    }
    let mut login = b.login(hub, nonce, SessionKind::Agent);
    login.workspace_id = workspace;
    if kind == 1 {
        // B's own objects, with a proof for the other workspace.
        login.signature = proof(LOGIN_KIND, b.agent_id.as_bytes());
        return FromAgent::Login(Box::new(login));
    }
    // Objects made for the other workspace, by whom it does not know.
    let signer = b.signer.as_ref().expect("a founder's");
    let mut certificate = b.presented.certificate.object().clone();
    certificate.workspace_id = workspace;
    let mut noise_key = b.presented.noise_key.object().clone();
    (noise_key.workspace_id, noise_key.agent_id) = (workspace, agent_id);
    login.presented.certificate = Blob(signer.sign(&certificate).encode());
    login.presented.noise_key = Blob(b.signing.sign(&noise_key).encode());
    login.signature = proof(LOGIN_KIND, agent_id.as_bytes());
    if kind == 3 {
        let genesis = genesis.clone();
        login.create = Some(CreateWorkspace { genesis, registration_token: None });
    }
    FromAgent::Login(Box::new(login))
}

/// Two sets of times that nobody can tell apart: their medians differ by less than by a factor.
#[track_caller]
fn check_alike(what: &str, there: &mut [Duration], nowhere: &mut [Duration]) {
    let median = |times: &mut [Duration]| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    };
    let (there, nowhere) = (median(there), median(nowhere));
    assert!(there < nowhere * 2.0 && nowhere < there * 2.0, "{what}: {there} s and {nowhere} s");
}

/// The answer to a request that did not come too early, and how long it took.
async fn ask_in_time(client: &mut Client, request: &Request) -> (Reply, Duration) {
    loop {
        let began = Instant::now();
        let reply = client.request(request.clone()).await;
        let time = began.elapsed();
        let Reply::Error(report) = &reply else { return (reply, time) };
        // A fast machine asks for more tunnels in a second than an agent may.
        if report.code != ErrorCode::RateLimited {
            return (reply, time);
        }
        sleep(Duration::from_millis(report.retry_in_ms.expect("it says when").into())).await;
    }
}

/// Ten thousand questions about A, each beside the same about what is nowhere.
#[test]
fn other_workspace_hears_the_same_of_what_exists_and_what_does_not() {
    const PROBES: usize = 10_000;
    const INTRUSIONS: usize = 100;
    let stage = Stage::set();
    stage.a.founder.ok(&["invite"]);
    let (b, hub) = (&stage.b_keys, stage.hub);
    let genesis = std::fs::read(stage.b.founder.dir().join("trust/genesis")).expect("enrolled");
    let genesis = Blob(genesis);
    let mut asked = 0;
    let mut times: BTreeMap<String, [Vec<Duration>; 2]> = BTreeMap::new();
    runtime().block_on(async {
        let there = Ids::of_a(&stage).await;
        let mut client = Client::login(hub, b, SessionKind::Agent).await;
        let mut round = 0_u8;
        while asked < PROBES - 8 * INTRUSIONS {
            round = round.wrapping_add(1);
            let nowhere = there.nowhere(&stage.a_keys, round);
            let pairs = there.requests(b).into_iter().zip(nowhere.requests(b));
            for (number, (one, other)) in pairs.enumerate() {
                let mut answers = Vec::new();
                // Neither is always the first.
                let order = if round.is_multiple_of(2) { [0, 1] } else { [1, 0] };
                let both = [one, other];
                for which in order {
                    let (reply, time) = ask_in_time(&mut client, &both[which]).await;
                    let name = format!("request {number}");
                    times.entry(name).or_default()[which].push(time);
                    answers.push(control::encode(&FromHub::Reply { id: 0, reply }));
                    asked += 1;
                }
                assert_eq!(answers[0], answers[1], "request {number}: {:?}", both[0]);
            }
            // Answers for tunnels that were asked of others are heard by nobody.
            for ids in [&there, &nowhere] {
                let tunnel_id = TunnelId(ids.service.0);
                let message = Blob(vec![0; 2000]);
                client.send(&FromAgent::AcceptTunnel { tunnel_id, message }).await;
                let code = ErrorCode::Refused;
                client.send(&FromAgent::RefuseTunnel { tunnel_id, code }).await;
            }
        }

        for round in 0..INTRUSIONS {
            let probe = u8::try_from(round % 255).expect("below 255") + 1;
            let nowhere = WorkspaceId(beside(there.workspace.0, probe));
            for kind in 0..4 {
                let mut answers = Vec::new();
                let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
                for which in order {
                    let mut client = Client::dial(hub).await;
                    let workspace = [there.workspace, nowhere][which];
                    let message = intrusion(b, &genesis, hub, &client.nonce, workspace, kind);
                    let began = Instant::now();
                    client.send(&message).await;
                    let answer = client.next().await.expect("an answer");
                    let name = format!("intrusion {kind}");
                    times.entry(name).or_default()[which].push(began.elapsed());
                    assert!(matches!(answer, FromHub::Error(_)), "{answer:?}");
                    answers.push((control::encode(&answer), client.close_code().await));
                    asked += 1;
                }
                assert_eq!(answers[0], answers[1], "intrusion {kind}");
            }
        }
    });
    assert!(asked >= PROBES, "{asked}");
    for (what, [there, nowhere]) in &mut times {
        check_alike(what, there, nowhere);
    }
    stage.check_unharmed();
}

#[test]
fn other_workspace_sees_no_key_and_no_event_and_ends_no_key() {
    let stage = Stage::set();
    runtime().block_on(async {
        let mut a = Client::login(stage.hub, &stage.a_keys, SessionKind::Command).await;
        let mut b = Client::login(stage.hub, &stage.b_keys, SessionKind::Command).await;
        let (_, of_a) = new_api_key(&mut a, Duration::from_secs(60)).await;
        assert!(api_keys(&mut b).await.is_empty());
        let (_, of_b) = new_api_key(&mut b, Duration::from_secs(60)).await;
        assert_eq!(api_keys(&mut b).await, BTreeSet::from([of_b.to_string()]));
        let there = b.request(Request::RevokeApiKey { key_id: of_a }).await;
        let nowhere = b.request(Request::RevokeApiKey { key_id: ApiKeyId([8; 16]) }).await;
        assert!(refused_with(&there, ErrorCode::NotFound), "{there:?}");
        assert_eq!(there, nowhere);
        assert_eq!(api_keys(&mut a).await, BTreeSet::from([of_a.to_string()]));

        for after in [0, 1, 1_000_000] {
            let Reply::Audit { rows, .. } = b.request(Request::Audit { after, since: None }).await
            else {
                panic!("members read the audit log");
            };
            assert_eq!(rows.is_empty(), after == 1_000_000);
            let a = [stage.a_keys.agent_id.to_string(), of_a.to_string()];
            for row in rows {
                assert!(!a.iter().any(|id| row.event.contains(id)), "{}", row.event);
            }
        }
    });
    stage.check_unharmed();
}

/// What the REST interface answers, but for the time of day.
async fn rest(hub: SocketAddr, method: &str, path: &str, key: &ApiKey) -> String {
    let mut socket = TcpStream::connect(hub).await.expect("a hub");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n",
        key.reveal()
    );
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("answered");
    let lines = answer.split_inclusive('\n').filter(|line| !line.starts_with("date:"));
    lines.collect()
}

/// What B asks over HTTP with its own keys, and strangers with what were keys of A, each beside the same
/// about what is nowhere.
#[test]
fn rest_interface_answers_the_same_of_what_exists_and_what_does_not() {
    const ROUNDS: u8 = 100;
    // So many that none asks more often than it may.
    const KEYS: usize = 20;
    const UNAUTHORIZED: &str = "HTTP/1.1 401 ";
    let hub = Hub::shared();
    let (a, b) = (Workspace::found(hub), Workspace::found(hub));
    a.founder.ok(&["invite"]);
    let reacher = Keys::of(&a.join("reacher"));
    let (a, b) = (Keys::of(&a.founder), Keys::of(&b.founder));
    let hub = hub.address();
    let mut times: BTreeMap<String, [Vec<Duration>; 2]> = BTreeMap::new();
    runtime().block_on(async {
        let (exposers, reachers, _sessions) = tickets(hub, &a, &reacher).await;
        let _far = data_socket(hub, &exposers, Encoding::Base64).await.expect("admitted");
        let _near = data_socket(hub, &reachers, Encoding::Base64).await.expect("admitted");
        let mut member = Client::login(hub, &a, SessionKind::Command).await;
        let hour = Duration::from_secs(3600);
        let (of_a, _) = new_api_key(&mut member, hour).await;
        let (revoked, key_id) = new_api_key(&mut member, hour).await;
        assert_eq!(member.request(Request::RevokeApiKey { key_id }).await, Reply::Done);
        let (expired, _) = new_api_key(&mut member, Duration::from_secs(1)).await;
        while !rest(hub, "GET", "/v1/tunnels", &expired).await.starts_with(UNAUTHORIZED) {}
        let Reply::Credentials { credentials, .. } =
            member.request(Request::Credentials { after: None }).await
        else {
            panic!("A has an invite");
        };
        let credential: Signed<Credential> =
            Signed::decode(&credentials[0].credential.0).expect("what the hub verified");
        let listed = |page: &str, id: &str| -> String {
            let (_, body) = page.split_once("\r\n\r\n").expect("a head");
            let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
            body["items"][0][id].as_str().expect("A has one").to_owned()
        };
        let tunnels = rest(hub, "GET", "/v1/tunnels", &of_a).await;
        let tunnel: TunnelId = listed(&tunnels, "tunnel_id").parse().expect("an id");
        let services = rest(hub, "GET", "/v1/services", &of_a).await;
        let service: ServiceId = listed(&services, "service_id").parse().expect("an id");

        let mut client = Client::login(hub, &b, SessionKind::Command).await;
        let mut keys = Vec::new();
        for _ in 0..KEYS {
            keys.push(new_api_key(&mut client, hour).await.0);
        }
        let mut keys = keys.iter().cycle();
        let paths = |probe: u8| {
            let spell = |id: [u8; 16]| if probe == 0 { id } else { beside(id, probe) };
            let tunnel = TunnelId(spell(tunnel.0));
            let service = ServiceId(spell(service.0));
            let agent = AgentId(spell(a.agent_id.0));
            let credential = CredentialId(spell(credential.object().id().0));
            [
                ("DELETE", format!("/v1/tunnels/{tunnel}")),
                ("GET", format!("/v1/tunnels?cursor={tunnel}")),
                ("GET", format!("/v1/services?cursor={service}")),
                ("GET", format!("/v1/agents?cursor={agent}")),
                ("GET", format!("/v1/shares?cursor={credential}")),
                ("GET", format!("/v1/audit?agent_id={agent}")),
            ]
        };
        for round in 1..=ROUNDS {
            // Neither is always the first.
            let order = if round.is_multiple_of(2) { [0, 1] } else { [1, 0] };
            for (one, other) in paths(0).into_iter().zip(paths(round)) {
                let both = [one, other];
                let mut answers = [String::new(), String::new()];
                let key = keys.next().expect("they come again");
                for which in order {
                    let (method, path) = &both[which];
                    let began = Instant::now();
                    answers[which] = rest(hub, method, path, key).await;
                    let what = format!("{method} {}", path.trim_end_matches(char::is_alphanumeric));
                    times.entry(what).or_default()[which].push(began.elapsed());
                }
                let expected = if both[0].0 == "DELETE" { "404" } else { "200" };
                assert!(answers[0].contains(&format!("HTTP/1.1 {expected} ")), "{}", answers[0]);
                assert_eq!(answers[0], answers[1], "{both:?}");
            }
            let nobodys = ApiKey::new([round; 32]);
            for (what, key) in [("revoked", &revoked), ("expired", &expired)] {
                let both = [key, &nobodys];
                let mut answers = [String::new(), String::new()];
                for which in order {
                    let began = Instant::now();
                    answers[which] = rest(hub, "GET", "/v1/services", both[which]).await;
                    times.entry(what.to_owned()).or_default()[which].push(began.elapsed());
                }
                assert!(answers[0].starts_with(UNAUTHORIZED), "{}", answers[0]);
                assert_eq!(answers[0], answers[1], "{what}");
            }
        }
        let tunnels = rest(hub, "GET", "/v1/tunnels", &of_a).await;
        assert_eq!(listed(&tunnels, "tunnel_id"), tunnel.to_string(), "it was not cut");
    });
    for (what, [there, nowhere]) in &mut times {
        check_alike(what, there, nowhere);
    }
}

#[test]
fn member_acts_for_no_other_member() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    pair.carry(service.address(), "svc");
    let exposed = &pair.exposer().json(&["status"])["exposed"][0];
    let id: ServiceId = exposed["service_id"].as_str().and_then(|id| id.parse().ok()).expect("id");
    let other = pair.workspace.join("other");
    let keys = Keys::of(&other);
    let hub = Hub::shared().address();
    runtime().block_on(async {
        let mut client = Client::login(hub, &keys, SessionKind::Agent).await;
        let reply = client.request(Request::Unexpose { service_id: id }).await;
        assert!(refused_with(&reply, ErrorCode::NotFound), "{reply:?}");
        let tag = keys.names.tag(&"svc".parse().expect("a name"));
        let expose = |service_id| Request::Expose {
            service_id,
            tag,
            record: sealed(u32::MAX),
            take_over: true,
        };
        for service_id in [id, ServiceId([3; 16])] {
            let reply = client.request(expose(service_id)).await;
            assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
        }
        // Accepting a tunnel that was not asked of this agent does nothing.
        for tunnel in [TunnelId([0; 16]), TunnelId([1; 16])] {
            let message = Blob(vec![0; 2000]);
            client.send(&FromAgent::AcceptTunnel { tunnel_id: tunnel, message }).await;
            let code = ErrorCode::Refused;
            client.send(&FromAgent::RefuseTunnel { tunnel_id: tunnel, code }).await;
        }
        let reply = client.request(Request::Services { after: None }).await;
        assert!(matches!(&reply, Reply::Services { services, .. } if services.len() == 1));
    });
    assert_eq!(pair.reacher.json(&["status"])["reached"][0]["active"], true);
}

#[test]
fn garbage_tickets_open_nothing() {
    let hub = Hub::shared().address();
    for ticket in ["", "x", &"0".repeat(64), &"F".repeat(64), &"0".repeat(10_000)] {
        for encoding in [Encoding::Base64, Encoding::Binary] {
            let refused = runtime().block_on(data_socket(hub, ticket, encoding)).err();
            assert_eq!(refused, Some(401), "{} characters", ticket.len());
        }
    }
}

#[test]
fn ticket_admits_once_and_in_its_encoding() {
    let workspace = Workspace::found(Hub::shared());
    let other = workspace.join("other");
    let hub = Hub::shared().address();
    runtime().block_on(async {
        let (exposers, reachers, _sessions) =
            tickets(hub, &Keys::of(&workspace.founder), &Keys::of(&other)).await;
        let wrong = data_socket(hub, &reachers, Encoding::Binary).await.err();
        assert!(matches!(wrong, Some(400 | 401)), "{wrong:?}");

        let (exposers_2, reachers_2, _sessions) =
            tickets(hub, &Keys::of(&workspace.founder), &Keys::of(&other)).await;
        let one = data_socket(hub, &reachers_2, Encoding::Base64).await.expect("the first use");
        // The same end cannot play the other one as well.
        assert_eq!(data_socket(hub, &reachers_2, Encoding::Base64).await.err(), Some(401));
        let two = data_socket(hub, &exposers_2, Encoding::Base64).await.expect("the first use");
        for used in [&reachers_2, &exposers_2] {
            assert_eq!(data_socket(hub, used, Encoding::Base64).await.err(), Some(401));
        }
        drop((one, two, exposers));
    });
}

#[test]
fn socket_whose_other_end_does_not_come_is_closed() {
    let workspace = Workspace::found(Hub::shared());
    let other = workspace.join("other");
    let hub = Hub::shared().address();
    runtime().block_on(async {
        let (exposers, reachers, _sessions) =
            tickets(hub, &Keys::of(&workspace.founder), &Keys::of(&other)).await;
        let mut alone = data_socket(hub, &exposers, Encoding::Base64).await.expect("admitted");
        let Some(Ok(message)) = alone.next().await else {
            panic!("it is closed with a word");
        };
        let Message::Close(Some(frame)) = message else {
            panic!("{message:?}");
        };
        assert_eq!(u16::from(frame.code), close::PEER_GONE);
        // By then the other ticket is over, too.
        assert_eq!(data_socket(hub, &reachers, Encoding::Base64).await.err(), Some(401));
    });
}
