//! The trust log at the hub: reading, appending, and the secrets of epochs on their way.

use connect_spec::{
    bytes::Blob,
    control::{
        AddressedWrap, EpochWrap, ErrorCode, ErrorReport, FromHub, Recipient, Reply, Request, close,
    },
    ids::{AgentId, CredentialId},
    limits::{MAX_KEPT, MAX_LOCATOR},
    log::{Change, EntryHash, Head, LogEntry, ObjectHash, Policy},
    objects::SignerRole,
};

use crate::{
    client::{Agent, Control, Workspace, error_code, new_key, past, public},
    process::HubProcess,
    template::place,
};

fn policy(strict: bool) -> Vec<Change> {
    vec![Change::Policy(Policy { strict })]
}

fn revoke(agent: &Agent) -> Vec<Change> {
    vec![Change::RevokeAgent { agent_id: agent.id, below_serial: None }]
}

fn refusal(reply: Reply) -> ErrorCode {
    match reply {
        Reply::Error(ErrorReport { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

fn epoch(epoch: u32) -> Vec<Change> {
    vec![Change::EpochKey { epoch, commit: [7; 32] }]
}

/// Entries in a row by the founder.
fn chain(workspace: &Workspace, after: Head, changes: Vec<Vec<Change>>) -> Vec<LogEntry> {
    let mut head = after;
    changes
        .into_iter()
        .map(|changes| {
            let entry = workspace.entry(head, changes);
            head = entry.head();
            entry
        })
        .collect()
}

#[tokio::test]
async fn entries_are_appended_once_and_by_one_at_a_time() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let (agent, other) = (workspace.founder(), workspace.founder());
    let mut first = Control::log_in(hub.agents, &workspace, &agent).await;
    let mut second = Control::log_in(hub.agents, &workspace, &other).await;
    assert_eq!(first.log(&[]).await, (workspace.head(), vec![]));

    let entries = chain(&workspace, workspace.head(), vec![policy(true), policy(false)]);
    let head = entries[1].head();
    assert_eq!(first.append(&entries[..1]).await, Reply::Done);
    first.expect_head(entries[0].head()).await;
    second.expect_head(entries[0].head()).await;
    // What the hub has already is skipped, whoever brings it.
    assert_eq!(second.append(&entries).await, Reply::Done);
    assert_eq!(first.append(&entries).await, Reply::Done);
    first.expect_head(head).await;
    second.expect_head(head).await;

    // Two at once: one of them has to read the log again.
    let rivals = [policy(true), epoch(1)].map(|changes| workspace.entry(head, changes));
    let (left, right) = tokio::join!(first.append(&rivals[..1]), second.append(&rivals[1..]));
    let winner = match (left, right) {
        (Reply::Done, Reply::Error(report)) | (Reply::Error(report), Reply::Done)
            if report.code == ErrorCode::Conflict =>
        {
            let (_, log) = first.log(&[head]).await;
            assert!(log == rivals[..1] || log == rivals[1..]);
            log
        }
        other => panic!("{other:?}"),
    };

    // Another hub process makes the state anew from what is stored.
    hub.stop().await;
    let hub = HubProcess::start(&data_dir).await;
    let mut control = Control::connect(hub.agents).await;
    match control.try_log_in(&agent, |_| ()).await {
        FromHub::Welcome { head, .. } => assert_eq!(head, winner[0].head()),
        other => panic!("{other:?}"),
    }
    let more = workspace.entry(winner[0].head(), policy(true));
    assert_eq!(control.append(std::slice::from_ref(&more)).await, Reply::Done);
    let expected: Vec<_> = entries.into_iter().chain(winner).chain([more]).collect();
    assert_eq!(control.log(&[]).await, (workspace.head(), expected));
    hub.stop().await;
}

#[tokio::test]
async fn what_does_not_hold_is_refused_whole() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let admin = new_key();
    let add = |key, role| vec![Change::AddSigner { key, role }];
    let entry = workspace.entry(workspace.head(), add(public(&admin), SignerRole::Admin));
    assert_eq!(control.append(std::slice::from_ref(&entry)).await, Reply::Done);
    let head = entry.head();

    let stranger = new_key();
    let by = |signer, changes| workspace.entry_by(signer, head, changes, Vec::new());
    let good = workspace.entry(head, policy(true));
    let gap = workspace.entry(Head { seq: 7, hash: EntryHash([1; 32]) }, policy(true));
    let elsewhere = Workspace::new();
    let foreign = elsewhere.entry(elsewhere.head(), policy(true));
    let last_owner = Change::RemoveSigner { key: public(&workspace.signer), keep: vec![] };
    let mut forged = workspace.entry(head, policy(true)).encode();
    *forged.last_mut().unwrap() ^= 1;
    let forged = LogEntry::decode(&forged).unwrap();
    for (what, entries, code) in [
        ("a stranger", vec![by(&stranger, policy(true))], ErrorCode::Forbidden),
        ("an admin's policy", vec![by(&admin, policy(true))], ErrorCode::Forbidden),
        ("a forged signature", vec![forged.clone()], ErrorCode::Forbidden),
        ("the last owner", vec![workspace.entry(head, vec![last_owner])], ErrorCode::Forbidden),
        ("another workspace", vec![foreign], ErrorCode::Forbidden),
        ("an epoch too far", vec![workspace.entry(head, epoch(2))], ErrorCode::BadRequest),
        ("a gap", vec![gap], ErrorCode::Conflict),
        ("a sibling", vec![workspace.entry(workspace.head(), policy(true))], ErrorCode::Conflict),
        ("no successor", vec![good.clone(), forged], ErrorCode::BadRequest),
        ("half of it", vec![good.clone(), by(&admin, policy(true))], ErrorCode::BadRequest),
        ("nothing", vec![], ErrorCode::BadRequest),
    ] {
        assert_eq!(refusal(control.append(&entries).await), code, "{what}");
    }
    let two = [good.clone(), workspace.entry_by(&stranger, good.head(), policy(false), vec![])];
    assert_eq!(refusal(control.append(&two).await), ErrorCode::Forbidden);
    let malformed = Request::Append { entries: vec![vec![1, 2, 3].into()] };
    assert_eq!(control.refused(malformed).await, ErrorCode::BadRequest);
    assert_eq!(control.log(&[]).await.1, [entry]);
    // What an admin may do, it does.
    let revocation =
        by(&admin, vec![Change::RevokeAgent { agent_id: AgentId([9; 16]), below_serial: None }]);
    assert_eq!(control.append(&[revocation]).await, Reply::Done);
    hub.stop().await;
}

#[tokio::test]
async fn the_log_comes_in_parts_from_where_two_logs_part() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    // Two of the longest do not fit one message.
    let long = |number: u8| {
        let mut keep = vec![ObjectHash([number; 32]); MAX_KEPT];
        for (index, hash) in keep.iter_mut().enumerate() {
            hash.0[..8].copy_from_slice(&(index as u64).to_be_bytes());
        }
        vec![Change::CloseCredential { credential_id: CredentialId([number; 16]), keep }]
    };
    let mut changes = vec![long(1), long(2), long(3)];
    changes.extend((0..400).map(|number| policy(number % 2 == 0)));
    let entries = chain(&workspace, workspace.head(), changes);
    for entries in entries[..3].chunks(1).chain(entries[3..].chunks(100)) {
        assert_eq!(control.append(entries).await, Reply::Done);
    }
    assert_eq!(control.log(&[]).await, (workspace.head(), entries.clone()));
    match control.request(Request::Log { have: vec![] }).await {
        Reply::Log { entries, more, .. } => assert_eq!((entries.len(), more), (1, true)),
        other => panic!("{other:?}"),
    }

    let unknown = |seq| Head { seq, hash: EntryHash([9; 32]) };
    let have = [unknown(u64::MAX), unknown(300), entries[200].head(), entries[5].head()];
    let (after, rest) = control.log(&have).await;
    assert_eq!(after, entries[200].head());
    assert_eq!(rest, entries[201..]);
    let last = entries[402].head();
    assert_eq!(control.log(&[last]).await, (last, vec![]));
    assert_eq!(control.log(&[unknown(1)]).await.0, workspace.head());
    let many = Request::Log { have: vec![last; MAX_LOCATOR] };
    assert!(matches!(control.request(many).await, Reply::Log { more: false, .. }));
    let too_many = Request::Log { have: vec![last; MAX_LOCATOR + 1] };
    assert_eq!(control.refused(too_many).await, ErrorCode::BadRequest);
    hub.stop().await;
}

#[tokio::test]
async fn before_the_login_the_log_is_for_the_holder_of_an_invite() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut founder = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let invite = workspace.invite(1, None);
    founder.done(invite.request()).await;
    let entry = workspace.entry(workspace.head(), policy(true));
    assert_eq!(founder.append(std::slice::from_ref(&entry)).await, Reply::Done);

    let mut stranger = Control::connect(hub.agents).await;
    stranger.ask(Request::Log { have: vec![] }).await;
    stranger.expect_close(close::BAD_REQUEST).await;

    let mut joiner = Control::connect(hub.agents).await;
    assert!(matches!(joiner.redeem(&workspace, &invite).await, FromHub::Invitation { .. }));
    assert_eq!(joiner.log(&[]).await, (workspace.head(), vec![entry.clone()]));
    let welcome = joiner.try_log_in(&workspace.joiner(&invite), |_| ()).await;
    match welcome {
        FromHub::Welcome { head, .. } => assert_eq!(head, entry.head()),
        other => panic!("{other:?}"),
    }

    // The log and nothing else.
    let invite = workspace.invite(1, None);
    founder.done(invite.request()).await;
    let mut curious = Control::connect(hub.agents).await;
    assert!(matches!(curious.redeem(&workspace, &invite).await, FromHub::Invitation { .. }));
    curious.ask(Request::Agents { after: None }).await;
    curious.expect_close(close::BAD_REQUEST).await;
    hub.stop().await;
}

#[tokio::test]
async fn a_recovery_replaces_the_end_of_the_log_but_no_revocation() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let invite = workspace.invite(2, None);
    let (founder, revoked) = (workspace.founder(), workspace.founder());
    let mut control = Control::log_in(hub.agents, &workspace, &founder).await;
    control.done(invite.request()).await;
    let victim = Control::log_in(hub.agents, &workspace, &revoked).await;
    let old = chain(&workspace, workspace.head(), vec![policy(true), revoke(&revoked), epoch(1)]);
    assert_eq!(control.append(&old).await, Reply::Done);
    victim.expect_close(close::REVOKED).await;

    let owner = new_key();
    let stranger = Workspace::new();
    let not_ours = {
        let LogEntry::Recovery(theirs) = stranger.recover(old[0].head(), 1, &owner) else {
            unreachable!();
        };
        LogEntry::Recovery(theirs)
    };
    assert_eq!(refusal(control.append(&[not_ours]).await), ErrorCode::Forbidden);
    let nowhere = workspace.recover(Head { seq: 1, hash: EntryHash([3; 32]) }, 1, &owner);
    assert_eq!(refusal(control.append(&[nowhere]).await), ErrorCode::Conflict);

    let recovery = workspace.recover(old[0].head(), 1, &owner);
    let next = workspace.entry_by(&owner, recovery.head(), policy(false), Vec::new());
    let new = [recovery.clone(), next.clone()];
    assert_eq!(control.append(&new).await, Reply::Done);
    // The founder's certificates ended with it.
    control.expect_close(close::REVOKED).await;
    let agent = workspace.renewed(&founder, &owner, 1);
    let mut control = Control::connect(hub.agents).await;
    assert!(matches!(control.try_log_in(&agent, |_| ()).await, FromHub::Welcome { .. }));
    let expected = vec![old[0].clone(), recovery.clone(), next.clone()];
    assert_eq!(control.log(&[]).await.1, expected);
    // The same again is no news; the old end and an old recovery lost.
    assert_eq!(control.append(&new).await, Reply::Done);
    assert_eq!(refusal(control.append(&old).await), ErrorCode::Conflict);
    let rival = workspace.recover(old[0].head(), 1, &new_key());
    assert_eq!(refusal(control.append(&[rival]).await), ErrorCode::Conflict);
    let dismissed = workspace.entry(next.head(), policy(true));
    assert_eq!(refusal(control.append(&[dismissed]).await), ErrorCode::Forbidden);

    // A hub that starts anew knows the revocation too, though no entry that is left says so.
    hub.stop().await;
    let hub = HubProcess::start(&data_dir).await;
    let mut control = Control::connect(hub.agents).await;
    assert!(matches!(control.try_log_in(&agent, |_| ()).await, FromHub::Welcome { .. }));
    let more = workspace.entry_by(&owner, next.head(), policy(true), Vec::new());
    assert_eq!(control.append(&[more]).await, Reply::Done);
    let again = workspace.renewed(&revoked, &owner, 5);
    let mut victim = Control::connect(hub.agents).await;
    assert_eq!(error_code(victim.try_log_in(&again, |_| ()).await), ErrorCode::Revoked);
    // And a second recovery replaces the first.
    let second = workspace.recover(workspace.head(), 2, &owner);
    assert_eq!(control.append(std::slice::from_ref(&second)).await, Reply::Done);
    assert_eq!(control.log(&[]).await.1, [second]);
    let mut victim = Control::connect(hub.agents).await;
    assert_eq!(error_code(victim.try_log_in(&again, |_| ()).await), ErrorCode::Revoked);
    hub.stop().await;
}

#[tokio::test]
async fn an_owner_who_gives_a_branch_up_replaces_it() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let (owner, admin) = (new_key(), new_key());
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    let add = |key| vec![Change::AddSigner { key: public(key), role: SignerRole::Owner }];
    let base = workspace.entry(workspace.head(), add(&owner));
    let held = workspace.entry(base.head(), add(&admin));
    assert_eq!(control.append(&[base.clone(), held.clone()]).await, Reply::Done);

    let sibling = workspace.entry_by(&owner, base.head(), policy(true), Vec::new());
    let settle = |by| workspace.entry_by(by, sibling.head(), policy(false), vec![held.hash()]);
    assert_eq!(refusal(control.append(std::slice::from_ref(&sibling)).await), ErrorCode::Conflict);
    // Who signed both siblings settles nothing; whoever was added in a branch neither.
    assert_eq!(
        refusal(control.append(&[sibling.clone(), settle(&admin)]).await),
        ErrorCode::Forbidden
    );
    let settled = [sibling.clone(), settle(&owner)];
    assert_eq!(control.append(&settled).await, Reply::Done);
    control.expect_head(settled[1].head()).await;
    assert_eq!(control.log(&[]).await.1, [base, sibling, settled[1].clone()]);
    hub.stop().await;
}

fn wrap(epoch: u32, byte: u8) -> EpochWrap {
    EpochWrap { epoch, sealed: vec![byte; 1200].into() }
}

fn addressed(recipient: Recipient, wrap: EpochWrap) -> AddressedWrap {
    AddressedWrap { recipient, wrap }
}

async fn missing(control: &mut Control, epoch: u32) -> (Vec<AgentId>, Vec<Blob>) {
    match control.request(Request::MissingWraps { epoch }).await {
        Reply::MissingWraps { agents, credentials } => (
            agents.into_iter().map(|agent| agent.agent_id).collect(),
            credentials.into_iter().map(|credential| credential.credential).collect(),
        ),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn wraps_reach_whom_they_are_for() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let (mine, other, revoked) = (workspace.founder(), workspace.founder(), workspace.founder());
    let mut control = Control::log_in(hub.agents, &workspace, &mine).await;
    let mut receiving = Control::log_in(hub.agents, &workspace, &other).await;
    drop(Control::log_in(hub.agents, &workspace, &revoked).await);
    let (open, closed, late) =
        (workspace.invite(1, None), workspace.invite(1, None), workspace.invite(1, Some(past())));
    for invite in [&open, &closed, &late] {
        control.done(invite.request()).await;
    }
    assert_eq!(missing(&mut control, 0).await.1, [0_u8; 0].map(|_| Blob::default()));
    let close = Change::CloseCredential { credential_id: closed.id(), keep: vec![] };
    let entry =
        workspace.entry(workspace.head(), [revoke(&revoked), vec![close], epoch(1)].concat());
    assert_eq!(control.append(std::slice::from_ref(&entry)).await, Reply::Done);
    receiving.expect_head(entry.head()).await;

    let mut both = vec![mine.id, other.id];
    both.sort();
    let expected = (both, vec![open.credential.encode().into()]);
    assert_eq!(missing(&mut control, 1).await, expected);
    let for_other = addressed(Recipient::Agent(other.id), wrap(1, 1));
    let for_invite = addressed(Recipient::Credential(open.id()), wrap(1, 2));
    control.done(Request::StoreWraps { wraps: vec![for_other.clone(), for_invite] }).await;
    assert_eq!(receiving.event().await, FromHub::WrapStored { epoch: 1 });
    assert_eq!(missing(&mut control, 1).await, (vec![mine.id], vec![]));
    let own = Request::OwnWrap { epoch: 1 };
    assert_eq!(receiving.request(own.clone()).await, Reply::Wrap { wrap: Some(wrap(1, 1)) });
    assert_eq!(control.request(own.clone()).await, Reply::Wrap { wrap: None });
    // The newest is what a joiner gets, and one that is there is replaced.
    let mut joiner = Control::connect(hub.agents).await;
    match joiner.redeem(&workspace, &open).await {
        FromHub::Invitation { wrap: found, .. } => assert_eq!(found, Some(wrap(1, 2))),
        other => panic!("{other:?}"),
    }
    let again = addressed(Recipient::Agent(other.id), wrap(1, 3));
    control.done(Request::StoreWraps { wraps: vec![again] }).await;
    assert_eq!(receiving.request(own).await, Reply::Wrap { wrap: Some(wrap(1, 3)) });

    let to = |recipient| addressed(recipient, wrap(1, 4));
    let mut too_long = for_other.clone();
    too_long.wrap.sealed = vec![0; 2049].into();
    let early = addressed(Recipient::Agent(other.id), wrap(2, 5));
    let nobody = to(Recipient::Agent(AgentId([0; 16])));
    let no_invite = to(Recipient::Credential(CredentialId([0; 16])));
    for (wraps, code) in [
        (vec![too_long], ErrorCode::BadRequest),
        (vec![early], ErrorCode::BadRequest),
        (vec![to(Recipient::Agent(mine.id)), nobody], ErrorCode::NotFound),
        (vec![no_invite], ErrorCode::NotFound),
    ] {
        assert_eq!(control.refused(Request::StoreWraps { wraps }).await, code);
    }
    assert_eq!(missing(&mut control, 1).await.0, [mine.id], "half of a refused request was stored");

    // Two epochs later the first ones are gone where there are newer ones.
    let entries = chain(&workspace, entry.head(), vec![epoch(2), epoch(3)]);
    assert_eq!(control.append(&entries).await, Reply::Done);
    let newest = addressed(Recipient::Agent(other.id), wrap(3, 6));
    control.done(Request::StoreWraps { wraps: vec![newest] }).await;
    assert_eq!(receiving.request(Request::OwnWrap { epoch: 1 }).await, Reply::Wrap { wrap: None });
    let mut joiner = Control::connect(hub.agents).await;
    assert!(matches!(joiner.redeem(&workspace, &open).await, FromHub::Invitation { .. }));
    hub.stop().await;
}

#[tokio::test]
async fn missing_wraps_come_in_parts() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let workspace = Workspace::new();
    let mut control = Control::log_in(hub.agents, &workspace, &workspace.founder()).await;
    for _ in 0..29 {
        drop(Control::log_in(hub.agents, &workspace, &workspace.founder()).await);
    }
    for _ in 0..30 {
        control.done(workspace.invite(1, None).request()).await;
    }
    let entry = workspace.entry(workspace.head(), epoch(1));
    assert_eq!(control.append(&[entry]).await, Reply::Done);
    let (mut agents, mut credentials, mut parts) = (0, 0, 0);
    loop {
        let reply = control.request(Request::MissingWraps { epoch: 1 }).await;
        let Reply::MissingWraps { agents: some, credentials: open } = reply else {
            panic!("{reply:?}");
        };
        if some.is_empty() && open.is_empty() {
            break;
        }
        parts += 1;
        agents += some.len();
        credentials += open.len();
        let id = |wire: &Blob| {
            type Signed = connect_spec::signed::Signed<connect_spec::objects::Credential>;
            Signed::decode(&wire.0).unwrap().object().id()
        };
        let to_agents = some.iter().map(|agent| Recipient::Agent(agent.agent_id));
        let to_open = open.iter().map(|open| Recipient::Credential(id(&open.credential)));
        let wraps = to_agents.chain(to_open).map(|to| addressed(to, wrap(1, 1))).collect();
        control.done(Request::StoreWraps { wraps }).await;
    }
    assert_eq!((agents, credentials), (30, 30));
    assert!(parts > 2, "one part holds it all: the test tests nothing");
    hub.stop().await;
}

#[tokio::test]
async fn another_workspace_is_out_of_reach() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let (ours, theirs) = (Workspace::new(), Workspace::new());
    let mine = ours.founder();
    let mut control = Control::log_in(hub.agents, &ours, &mine).await;
    let invite = ours.invite(1, None);
    control.done(invite.request()).await;
    let entries = chain(&ours, ours.head(), vec![policy(true), epoch(1)]);
    assert_eq!(control.append(&entries).await, Reply::Done);
    control.expect_head(entries[1].head()).await;
    let wraps = vec![addressed(Recipient::Agent(mine.id), wrap(1, 1))];
    control.done(Request::StoreWraps { wraps: wraps.clone() }).await;

    let stranger = theirs.founder();
    let mut intruder = Control::log_in(hub.agents, &theirs, &stranger).await;
    let have = [entries[0].head(), entries[1].head()];
    assert_eq!(intruder.log(&have).await, (theirs.head(), vec![]));
    let next = ours.entry(entries[1].head(), policy(false));
    for entries in [&entries[..], &[next]] {
        assert_eq!(refusal(intruder.append(entries).await), ErrorCode::Forbidden);
    }
    let epochs = chain(&theirs, theirs.head(), vec![epoch(1)]);
    assert_eq!(intruder.append(&epochs).await, Reply::Done);
    assert_eq!(intruder.refused(Request::StoreWraps { wraps }).await, ErrorCode::NotFound);
    let to_invite = vec![addressed(Recipient::Credential(invite.id()), wrap(1, 1))];
    let to_invite = Request::StoreWraps { wraps: to_invite };
    assert_eq!(intruder.refused(to_invite).await, ErrorCode::NotFound);
    assert_eq!(missing(&mut intruder, 1).await, (vec![stranger.id], vec![]));
    let own = Request::OwnWrap { epoch: 1 };
    assert_eq!(intruder.request(own).await, Reply::Wrap { wrap: None });
    let none = Reply::Credentials { credentials: vec![], more: false };
    assert_eq!(intruder.request(Request::Credentials { after: None }).await, none);
    let certificate = ours.renewed(&mine, &ours.signer, 1).certificate();
    let certify = Request::Certify { certificate };
    assert_eq!(intruder.refused(certify).await, ErrorCode::NotFound);
    let mine_as_theirs = Request::Beats { mine: Some(mine.beat(ours.head(), 1)) };
    assert_eq!(intruder.refused(mine_as_theirs).await, ErrorCode::Forbidden);

    // And the own session was told of nothing else.
    assert_eq!(control.event().await, FromHub::WrapStored { epoch: 1 });
    let asked = control.ask(Request::Services { after: None }).await;
    assert!(matches!(control.receive().await, FromHub::Reply { id, .. } if id == asked));
    hub.stop().await;
}
