//! Whether the database keeps workspaces apart, read from its catalogue: what is there, held against what
//! the migrations make, and for each difference the SQL that mends it.
//!
//! Everything that it needs is open to every role, so the hub's own role sees as much as the owner. A new
//! table needs a line in [`TABLES`], a function that sees more than its caller one in [`FUNCTIONS`].

use serde::Serialize;
use sqlx::{Connection as _, postgres::PgConnection};

use super::{
    APP_ROLE, AUDIT_ROLE, BACKUP_ROLE, LOOKUP_ROLE, StoreError, latest_version, schema::definition,
    version,
};
use crate::limits::OLDEST_POSTGRES;

/// A privilege, on some columns or with an empty list on the whole table.
type Grant = (&'static str, &'static [&'static str]);

/// The whole table.
const ALL: &[&str] = &[];

/// What a table of the schema should look like. [`BACKUP_ROLE`] reads every one.
struct Table {
    name: &'static str,
    /// What [`APP_ROLE`] may.
    app: &'static [Grant],
    /// What [`LOOKUP_ROLE`] may.
    lookup: &'static [Grant],
    /// What [`AUDIT_ROLE`] may.
    audit: &'static [Grant],
    /// Whether it belongs to a workspace: then `connect.isolate` closes it.
    isolated: bool,
    /// Policies besides those that `connect.isolate` makes.
    policies: &'static [Policy],
    /// Foreign keys besides the one to the workspace.
    references: &'static [&'static str],
}

/// What every table of workspaces has but the one that lists them.
const TO_WORKSPACE: &str = "FOREIGN KEY (workspace_id) REFERENCES connect.workspaces(workspace_id)";
const TO_AGENT: &str = "FOREIGN KEY (workspace_id, agent_id) \
     REFERENCES connect.agents(workspace_id, agent_id) ON DELETE CASCADE";
const TO_CREDENTIAL: &str = "FOREIGN KEY (workspace_id, credential_id) \
     REFERENCES connect.credentials(workspace_id, credential_id)";

/// A policy, with its expressions as the catalogue prints them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Policy {
    name: &'static str,
    command: &'static str,
    role: &'static str,
    using: Option<&'static str>,
    check: Option<&'static str>,
}

/// The rows of the workspace that the transaction set; no rows when it set none.
const MINE: &str = "(workspace_id = decode(NULLIF(current_setting('connect.workspace_id'::text, true), ''::text), 'hex'::text))";

/// What `connect.isolate` makes.
const ISOLATED: &[Policy] = &[
    policy("workspace_select", "SELECT", APP_ROLE, Some(MINE), None),
    policy("workspace_insert", "INSERT", APP_ROLE, None, Some(MINE)),
    policy("workspace_update", "UPDATE", APP_ROLE, Some(MINE), Some(MINE)),
    policy("workspace_delete", "DELETE", APP_ROLE, Some(MINE), None),
    policy("backup_select", "SELECT", BACKUP_ROLE, Some("true"), None),
];

const fn policy(
    name: &'static str,
    command: &'static str,
    role: &'static str,
    using: Option<&'static str>,
    check: Option<&'static str>,
) -> Policy {
    Policy { name, command, role, using, check }
}

/// A table of workspaces, of which `connect_app` may do so much, with these references.
const fn isolated(
    name: &'static str,
    app: &'static [Grant],
    references: &'static [&'static str],
) -> Table {
    Table { name, app, lookup: &[], audit: &[], isolated: true, policies: &[], references }
}

/// Every table of the schema.
const TABLES: &[Table] = &[
    isolated("agents", &[("SELECT", ALL), ("INSERT", ALL), ("UPDATE", ALL)], &[TO_CREDENTIAL]),
    isolated("credentials", &[("SELECT", ALL), ("INSERT", ALL), ("UPDATE", &["used"])], &[]),
    isolated("log_entries", &[("SELECT", ALL), ("INSERT", ALL), ("DELETE", ALL)], &[]),
    isolated(
        "services",
        &[("SELECT", ALL), ("INSERT", ALL), ("UPDATE", ALL), ("DELETE", ALL)],
        &[TO_AGENT],
    ),
    isolated(
        "shared_services",
        &[
            ("SELECT", ALL),
            ("INSERT", ALL),
            ("UPDATE", &["record", "record_counter", "record_epoch", "tag"]),
        ],
        &[
            "FOREIGN KEY (workspace_id, share_id) \
             REFERENCES connect.credentials(workspace_id, credential_id) ON DELETE CASCADE",
            "FOREIGN KEY (workspace_id, service_id) \
             REFERENCES connect.services(workspace_id, service_id) ON DELETE CASCADE",
        ],
    ),
    isolated(
        "workspaces",
        &[
            ("SELECT", ALL),
            ("INSERT", ALL),
            ("UPDATE", &["head_seq", "head_hash", "replaced", "trust"]),
        ],
        &[],
    ),
    isolated(
        "wraps",
        &[("SELECT", ALL), ("INSERT", ALL), ("UPDATE", &["wrap"]), ("DELETE", ALL)],
        &[
            TO_AGENT,
            "FOREIGN KEY (workspace_id, credential_id) \
             REFERENCES connect.credentials(workspace_id, credential_id) ON DELETE CASCADE",
        ],
    ),
    Table {
        name: "registration_tokens",
        app: &[("INSERT", &["token_hash", "expires_at"])],
        lookup: &[("SELECT", ALL), ("UPDATE", &["used_at"])],
        audit: &[],
        isolated: false,
        policies: &[
            policy("add", "INSERT", APP_ROLE, None, Some("(used_at IS NULL)")),
            policy("find", "SELECT", LOOKUP_ROLE, Some("true"), None),
            policy("spend", "UPDATE", LOOKUP_ROLE, Some("true"), None),
            policy("backup_select", "SELECT", BACKUP_ROLE, Some("true"), None),
        ],
        references: &[],
    },
    // Which migrations ran: nothing of a workspace, and open to those who are granted it.
    Table {
        name: "schema_history",
        app: &[("SELECT", ALL)],
        lookup: &[],
        audit: &[],
        isolated: false,
        policies: &[],
        references: &[],
    },
    Table {
        name: "api_keys",
        app: &[("SELECT", ALL), ("INSERT", ALL), ("UPDATE", &["last_used_at"]), ("DELETE", ALL)],
        lookup: &[("SELECT", &["workspace_id", "key_hash"])],
        audit: &[],
        isolated: true,
        policies: &[policy("find", "SELECT", LOOKUP_ROLE, Some("true"), None)],
        references: &[TO_AGENT],
    },
    Table {
        name: "audit_heads",
        app: &[("SELECT", ALL)],
        lookup: &[],
        audit: &[("SELECT", ALL), ("INSERT", ALL), ("UPDATE", ALL)],
        isolated: true,
        policies: &[
            policy("audit_select", "SELECT", AUDIT_ROLE, Some("true"), None),
            policy("audit_insert", "INSERT", AUDIT_ROLE, None, Some("true")),
            policy("audit_update", "UPDATE", AUDIT_ROLE, Some("true"), Some("true")),
        ],
        references: &[],
    },
    Table {
        name: "audit_events",
        app: &[("SELECT", ALL)],
        lookup: &[],
        audit: &[("SELECT", ALL), ("INSERT", ALL), ("DELETE", ALL)],
        isolated: true,
        policies: &[
            policy("audit_select", "SELECT", AUDIT_ROLE, Some("true"), None),
            policy("audit_insert", "INSERT", AUDIT_ROLE, None, Some("true")),
            policy("audit_delete", "DELETE", AUDIT_ROLE, Some("true"), None),
        ],
        references: &[],
    },
];

/// A function that somebody besides its owner may call.
struct Function {
    signature: &'static str,
    /// The role whose rows it sees, whoever calls it; `None`: it sees what its caller sees.
    definer: Option<&'static str>,
    caller: &'static str,
}

const fn definer(signature: &'static str, role: &'static str) -> Function {
    Function { signature, definer: Some(role), caller: APP_ROLE }
}

/// All of them.
const FUNCTIONS: &[Function] = &[
    definer("connect.spend_registration_token(bytea)", LOOKUP_ROLE),
    definer("connect.workspace_of_api_key(bytea)", LOOKUP_ROLE),
    definer("connect.append_audit(text[])", AUDIT_ROLE),
    definer("connect.expire_audit(interval)", AUDIT_ROLE),
    Function {
        signature: "connect.audit_link(bytea,bytea,bigint,text)",
        definer: None,
        caller: AUDIT_ROLE,
    },
];

/// The roles of the schema besides its owner.
const ROLES: [&str; 4] = [APP_ROLE, AUDIT_ROLE, BACKUP_ROLE, LOOKUP_ROLE];

/// The search path that such a function must pin: a table or operator of the caller could stand in its way.
const PINNED: &str = "search_path=pg_catalog, pg_temp";

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The server is older than the schema is written for.
    ServerVersion,
    /// The schema is older or newer than this program.
    SchemaVersion,
    /// A role may more than it should.
    Role,
    /// A role can become another one.
    Membership,
    /// Something belongs to the wrong role.
    Owner,
    /// A setting puts sessions into a workspace.
    Setting,
    /// Somebody may do what is not expected, or may not do what is.
    Grant,
    /// A table that no workspace closes.
    NotIsolated,
    /// Row security is not enabled.
    NotEnabled,
    /// Row security does not bind the owner.
    NotForced,
    /// A policy is not there.
    PolicyMissing,
    /// A policy says something else, or to somebody else.
    PolicyChanged,
    /// A policy that nobody knows.
    PolicyUnknown,
    /// A table that nobody knows.
    TableUnknown,
    /// A table that is not there.
    TableMissing,
    /// A partition, an heir, an unlogged table, a rule, a trigger.
    Oddity,
    /// A view over the tables: it sees with its owner's eyes.
    View,
    /// A function that sees more than its caller, that everybody may call, or that does something else.
    Function,
    /// A reference that can point into another workspace, or one that is not there or not checked.
    ForeignKey,
    /// A uniqueness that reaches over workspaces, so one can probe for rows of another.
    Unique,
}

/// What makes it good again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mend {
    /// Statements, to be run as the owner or a superuser.
    Sql(String),
    /// Something else to do.
    Advice(String),
}

/// One difference between what is and what should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub kind: Kind,
    /// Which part of the database.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// What makes it good.
    pub mend: Mend,
}

/// What an inspection came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The role that looked.
    pub role: String,
    /// What was looked at.
    pub checked: Vec<String>,
    /// What this role, or anybody by SQL, cannot see.
    pub unseen: Vec<String>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Report {
    fn find(
        &mut self,
        kind: Kind,
        object: impl Into<String>,
        problem: impl Into<String>,
        mend: Mend,
    ) {
        self.findings.push(Finding { kind, object: object.into(), problem: problem.into(), mend });
    }

    fn sql(
        &mut self,
        kind: Kind,
        object: impl Into<String>,
        problem: impl Into<String>,
        sql: impl Into<String>,
    ) {
        self.find(kind, object, problem, Mend::Sql(sql.into()));
    }
}

/// Reads the catalogue of the hub's database. Nothing is changed.
///
/// # Errors
/// [`StoreError::Database`].
pub async fn inspect(connection: &mut PgConnection) -> Result<Report, StoreError> {
    let mut tx = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    // Names that nothing of this database can shadow.
    sqlx::raw_sql("SET LOCAL search_path = pg_catalog, pg_temp").execute(&mut *tx).await?;
    let (server, server_name, role): (i32, String, String) = sqlx::query_as(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'), current_user::text",
    )
    .fetch_one(&mut *tx)
    .await?;
    let mut report = Report { role, checked: Vec::new(), unseen: Vec::new(), findings: Vec::new() };
    report.checked.push(format!("server: PostgreSQL {server_name}"));
    if u32::try_from(server / 10_000).is_ok_and(|major| major < OLDEST_POSTGRES) {
        report.find(
            Kind::ServerVersion,
            format!("PostgreSQL {server_name}"),
            format!("the hub needs version {OLDEST_POSTGRES} or later"),
            Mend::Advice("upgrade the server".to_owned()),
        );
    }
    let owner: Option<(String, bool)> = sqlx::query_as(
        "SELECT nspowner::regrole::text, pg_has_role(current_user, nspowner, 'MEMBER')
         FROM pg_namespace WHERE nspname = 'connect'",
    )
    .fetch_optional(&mut *tx)
    .await?;
    // Without the right to enter the schema its version cannot be asked for.
    let enters: Option<(bool,)> = sqlx::query_as(
        "SELECT has_schema_privilege(n.oid, 'USAGE') AND coalesce(has_table_privilege(c.oid, 'SELECT'), true)
         FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'schema_history'
         WHERE n.nspname = 'connect'",
    )
    .fetch_optional(&mut *tx)
    .await?;
    let found = match enters {
        Some((true,)) => Some(version(&mut tx).await?),
        Some((false,)) => None,
        None => Some(0),
    };
    let wanted = latest_version();
    match found {
        Some(found) if found == wanted => {
            report.checked.push(format!("schema: version {found}"));
        }
        Some(found) => {
            let advice = if found < wanted {
                "run `connect-hub migrate` with the owner's URL"
            } else {
                "this database belongs to a newer connect-hub: upgrade this one"
            };
            report.find(
                Kind::SchemaVersion,
                "schema connect",
                format!("version {found}, and this hub needs {wanted}"),
                Mend::Advice(advice.to_owned()),
            );
        }
        None => {
            report.unseen.push("the schema's version: this role may not read it".to_owned());
        }
    }
    check_roles(&mut tx, &mut report, server).await?;
    check_settings(&mut tx, &mut report).await?;
    match owner {
        Some((owner, is_owner)) => {
            report.unseen.push(if is_owner {
                "as which role `serve` connects: give this command the URL of `serve` to see it"
                    .to_owned()
            } else {
                "rows: this role sees none, and what is checked needs none".to_owned()
            });
            if found.is_none_or(|found| found == wanted) {
                check_schema(&mut tx, &mut report, &owner).await?;
            } else {
                report.unseen.push(
                    "the parts of the schema: this program knows those of its own version only"
                        .to_owned(),
                );
            }
        }
        None => report.unseen.push("the parts of the schema: there is none".to_owned()),
    }
    report.unseen.push(
        "pg_hba.conf, backups and replicas, and who is superuser outside the database".to_owned(),
    );
    tx.rollback().await?;
    Ok(report)
}

/// A table of the schema that [`BACKUP_ROLE`] does not see every row of.
///
/// # Errors
/// [`StoreError::Database`].
pub async fn first_unreadable(connection: &mut PgConnection) -> Result<Option<String>, StoreError> {
    let table: Option<(String,)> = sqlx::query_as(
        "SELECT c.relname::text FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'connect'
         WHERE c.relkind IN ('r', 'p') AND (
             NOT has_table_privilege($1, c.oid, 'SELECT')
             OR c.relrowsecurity AND (
                 NOT EXISTS (SELECT FROM pg_catalog.pg_policy p
                             WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*')
                               AND $1::regrole = ANY (p.polroles) AND pg_get_expr(p.polqual, c.oid) = 'true')
                 OR EXISTS (SELECT FROM pg_catalog.pg_policy p
                            WHERE p.polrelid = c.oid AND NOT p.polpermissive)))
         ORDER BY 1 LIMIT 1",
    )
    .bind(BACKUP_ROLE)
    .fetch_optional(connection)
    .await?;
    Ok(table.map(|(table,)| table))
}

/// What the three roles may, and what they can become.
async fn check_roles(
    connection: &mut PgConnection,
    report: &mut Report,
    server: i32,
) -> Result<(), StoreError> {
    let ours = ROLES;
    type Attributes = (String, bool, bool, bool, bool, bool, bool);
    let roles: Vec<Attributes> = sqlx::query_as(
        "SELECT rolname::text, rolcanlogin, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication
         FROM pg_roles WHERE rolname = ANY ($1) ORDER BY 1",
    )
    .bind(ours.map(str::to_owned).to_vec())
    .fetch_all(&mut *connection)
    .await?;
    for role in ours {
        let login = role == APP_ROLE;
        let Some((_, can_login, superuser, bypasses, creates_roles, creates_databases, replicates)) =
            roles.iter().find(|(name, ..)| name == role)
        else {
            let login = if login { "LOGIN" } else { "NOLOGIN" };
            report.sql(
                Kind::Role,
                format!("role {role}"),
                "is not there",
                format!("CREATE ROLE {role} {login};"),
            );
            continue;
        };
        for (has, should, attribute, without) in [
            (*can_login, login, "LOGIN", "NOLOGIN"),
            (*superuser, false, "SUPERUSER", "NOSUPERUSER"),
            (*bypasses, false, "BYPASSRLS", "NOBYPASSRLS"),
            (*creates_roles, false, "CREATEROLE", "NOCREATEROLE"),
            (*creates_databases, false, "CREATEDB", "NOCREATEDB"),
            (*replicates, false, "REPLICATION", "NOREPLICATION"),
        ] {
            if has != should {
                let (is, wanted) = if has { (attribute, without) } else { (without, attribute) };
                report.sql(
                    Kind::Role,
                    format!("role {role}"),
                    format!("is {is}"),
                    format!("ALTER ROLE {role} {wanted};"),
                );
            }
        }
        let owned: Vec<(String,)> = sqlx::query_as(
            "SELECT pg_describe_object(d.classid, d.objid, 0) FROM pg_shdepend d
             WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype = 'o'
               AND d.refobjid = (SELECT oid FROM pg_roles WHERE rolname = $1)
               AND d.dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
               -- Those of the schema are looked at one by one.
               AND NOT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                               WHERE d.classid = 'pg_class'::regclass AND c.oid = d.objid AND n.nspname = 'connect')
               AND NOT EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                               WHERE d.classid = 'pg_proc'::regclass AND p.oid = d.objid AND n.nspname = 'connect')
             ORDER BY 1 LIMIT 5",
        )
        .bind(role)
        .fetch_all(&mut *connection)
        .await?;
        if !owned.is_empty() {
            let owned: Vec<_> = owned.into_iter().map(|(name,)| name).collect();
            let mut sql = format!("REASSIGN OWNED BY {role} TO CURRENT_USER;");
            for function in FUNCTIONS.iter().filter(|function| function.definer == Some(role)) {
                sql.push('\n');
                sql.push_str(&give_away(function.signature, role));
            }
            report.sql(
                Kind::Owner,
                format!("role {role}"),
                format!("owns {}", owned.join(", ")),
                sql,
            );
        }
    }
    // Since version 16 a role that was made by its creator's CREATEROLE has that one as a member who can
    // neither become it nor inherit of it.
    let members: Vec<(String, String, String, bool)> = sqlx::query_as(
        "SELECT m.roleid::regrole::text, m.member::regrole::text, m.grantor::regrole::text,
                coalesce((to_jsonb(m) ->> 'set_option')::bool, true)
                OR coalesce((to_jsonb(m) ->> 'inherit_option')::bool, true)
         FROM pg_auth_members m
         WHERE m.member IN (SELECT oid FROM pg_roles WHERE rolname = ANY ($1))
            OR m.roleid IN (SELECT oid FROM pg_roles WHERE rolname = ANY ($1) AND rolname <> $2)
         ORDER BY 1, 2",
    )
    .bind(ours.map(str::to_owned).to_vec())
    .bind(APP_ROLE)
    .fetch_all(&mut *connection)
    .await?;
    let mut readers = Vec::new();
    for (role, member, grantor, works) in members {
        if !works {
            continue;
        }
        if role == BACKUP_ROLE && !ours.contains(&member.as_str()) {
            readers.push(member);
            continue;
        }
        let by = if server >= 160_000 { format!(" GRANTED BY {grantor}") } else { String::new() };
        report.sql(
            Kind::Membership,
            format!("role {member}"),
            format!("can become {role}"),
            format!("REVOKE {role} FROM {member}{by};"),
        );
    }
    report.checked.push(format!("roles: {}", ours.join(", ")));
    let readers =
        if readers.is_empty() { "superusers only".to_owned() } else { readers.join(", ") };
    report.checked.push(format!("who can become {BACKUP_ROLE} and read all workspaces: {readers}"));
    Ok(())
}

/// Whether something puts every session into a workspace.
async fn check_settings(
    connection: &mut PgConnection,
    report: &mut Report,
) -> Result<(), StoreError> {
    let settings: Vec<(Option<String>, Option<String>, String)> = sqlx::query_as(
        "SELECT CASE WHEN s.setrole <> 0 THEN s.setrole::regrole::text END,
                (SELECT quote_ident(d.datname) FROM pg_database d WHERE d.oid = s.setdatabase),
                split_part(c.setting, '=', 1)
         FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) AS c (setting)
         WHERE c.setting LIKE 'connect.workspace_id=%'",
    )
    .fetch_all(&mut *connection)
    .await?;
    for (role, database, name) in &settings {
        let (object, target) = match (role, database) {
            (Some(role), Some(database)) => {
                (format!("role {role}"), format!("ROLE {role} IN DATABASE {database}"))
            }
            (Some(role), None) => (format!("role {role}"), format!("ROLE {role}")),
            (None, Some(database)) => {
                (format!("database {database}"), format!("DATABASE {database}"))
            }
            (None, None) => ("every role".to_owned(), "ROLE ALL".to_owned()),
        };
        report.sql(
            Kind::Setting,
            object,
            format!("sets {name}, so its sessions begin inside a workspace"),
            format!("ALTER {target} RESET {name};"),
        );
    }
    let (inside,): (bool,) =
        sqlx::query_as("SELECT coalesce(current_setting('connect.workspace_id', true), '') <> ''")
            .fetch_one(connection)
            .await?;
    if inside && settings.is_empty() {
        report.find(
            Kind::Setting,
            "the server's configuration",
            "sets connect.workspace_id, so sessions begin inside a workspace",
            Mend::Advice(
                "remove it from postgresql.conf, or ALTER SYSTEM RESET connect.workspace_id"
                    .to_owned(),
            ),
        );
    }
    report.checked.push("settings that begin a session inside a workspace".to_owned());
    Ok(())
}

/// One table, view or sequence of the schema.
#[derive(Debug, sqlx::FromRow)]
struct Relation {
    oid: sqlx::postgres::types::Oid,
    /// Qualified and quoted.
    path: String,
    name: String,
    kind: String,
    owner: String,
    persistence: String,
    enabled: bool,
    forced: bool,
    has_workspace: bool,
}

/// Everything inside the schema.
async fn check_schema(
    connection: &mut PgConnection,
    report: &mut Report,
    owner: &str,
) -> Result<(), StoreError> {
    let relations: Vec<Relation> = sqlx::query_as(
        "SELECT c.oid, c.oid::regclass::text AS path, c.relname::text AS name, c.relkind::text AS kind,
                c.relowner::regrole::text AS owner, c.relpersistence::text AS persistence,
                c.relrowsecurity AS enabled, c.relforcerowsecurity AS forced,
                EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'workspace_id'
                        AND NOT a.attisdropped) AS has_workspace
         FROM pg_class c WHERE c.relnamespace = 'connect'::regnamespace AND c.relkind IN ('r', 'p', 'f', 'S')
         ORDER BY c.relname",
    )
    .fetch_all(&mut *connection)
    .await?;
    check_schema_grants(connection, report).await?;
    for table in TABLES {
        if !relations.iter().any(|relation| relation.name == table.name) {
            report.find(
                Kind::TableMissing,
                format!("connect.{}", table.name),
                "is not there",
                Mend::Advice("restore it from a backup: `connect-hub restore`".to_owned()),
            );
        }
    }
    for relation in &relations {
        let known = TABLES.iter().find(|table| table.name == relation.name);
        if relation.owner != owner {
            let mut sql = format!("ALTER TABLE {} OWNER TO {owner};\n", relation.path);
            // The new owner's grants are merged into the old one's.
            sql.push_str(&grants_sql(&relation.path, known));
            report.sql(
                Kind::Owner,
                &relation.path,
                format!("belongs to {} and not to {owner}", relation.owner),
                sql,
            );
        } else {
            check_grants(connection, report, relation, known).await?;
        }
        if relation.kind != "S" {
            check_table(connection, report, relation, known).await?;
        }
    }
    report.checked.push(format!(
        "tables: {} (row security, policies, grants, owner)",
        relations.iter().map(|relation| relation.name.as_str()).collect::<Vec<_>>().join(", ")
    ));
    check_links(connection, report).await?;
    check_keys(connection, report, &relations).await?;
    check_functions(connection, report).await?;
    Ok(())
}

/// Who may enter the schema and who may add to it.
async fn check_schema_grants(
    connection: &mut PgConnection,
    report: &mut Report,
) -> Result<(), StoreError> {
    let grants: Vec<(String, String)> = sqlx::query_as(
        "SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type
         FROM pg_namespace n CROSS JOIN aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
         WHERE n.nspname = 'connect' AND a.grantee <> n.nspowner ORDER BY 1, 2",
    )
    .fetch_all(connection)
    .await?;
    let roles = ROLES;
    for (grantee, privilege) in &grants {
        if privilege != "USAGE" || !roles.contains(&grantee.as_str()) {
            report.sql(
                Kind::Grant,
                "schema connect",
                format!("{grantee} has {privilege}"),
                format!("REVOKE {privilege} ON SCHEMA connect FROM {grantee};"),
            );
        }
    }
    for role in roles {
        if !grants.iter().any(|(grantee, privilege)| grantee == role && privilege == "USAGE") {
            report.sql(
                Kind::Grant,
                "schema connect",
                format!("{role} has no USAGE"),
                format!("GRANT USAGE ON SCHEMA connect TO {role};"),
            );
        }
    }
    Ok(())
}

/// The privileges that a table should give: to whom, which, on which column.
fn expected_grants(table: &Table) -> Vec<(&'static str, &'static str, Option<&'static str>)> {
    let mut expected = vec![(BACKUP_ROLE, "SELECT", None)];
    for (role, grants) in
        [(APP_ROLE, table.app), (LOOKUP_ROLE, table.lookup), (AUDIT_ROLE, table.audit)]
    {
        for (privilege, columns) in grants {
            if columns.is_empty() {
                expected.push((role, privilege, None));
            }
            expected.extend(columns.iter().map(|column| (role, *privilege, Some(*column))));
        }
    }
    expected
}

/// The statement part for a privilege on a table or on one of its columns.
fn privilege_on(privilege: &str, column: Option<&str>) -> String {
    column.map_or_else(|| privilege.to_owned(), |column| format!("{privilege} ({column})"))
}

/// Statements that leave a table with the grants that it should have.
fn grants_sql(path: &str, table: Option<&Table>) -> String {
    let mut sql = format!("REVOKE ALL ON {path} FROM PUBLIC, {};", ROLES.join(", "));
    for (role, privilege, column) in table.map(expected_grants).unwrap_or_default() {
        let privilege = privilege_on(privilege, column);
        sql.push_str(&format!("\nGRANT {privilege} ON {path} TO {role};"));
    }
    sql
}

async fn check_grants(
    connection: &mut PgConnection,
    report: &mut Report,
    relation: &Relation,
    known: Option<&Table>,
) -> Result<(), StoreError> {
    let grants: Vec<(String, String, Option<String>)> = sqlx::query_as(
        "SELECT CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END, g.privilege_type, g.col
         FROM (SELECT a.grantee, a.privilege_type, NULL::text AS col
               FROM pg_class c CROSS JOIN aclexplode(c.relacl) a WHERE c.oid = $1
               UNION ALL
               SELECT a.grantee, a.privilege_type, quote_ident(t.attname)
               FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) a
               WHERE t.attrelid = $1 AND NOT t.attisdropped) g
         WHERE g.grantee <> (SELECT relowner FROM pg_class WHERE oid = $1) ORDER BY 1, 2, 3",
    )
    .bind(relation.oid)
    .fetch_all(connection)
    .await?;
    let mut expected = known.map(expected_grants).unwrap_or_default();
    // Nobody reads what nobody knows, but a table that a workspace closes may be backed up.
    if known.is_none() && relation.has_workspace {
        expected.push((BACKUP_ROLE, "SELECT", None));
    }
    for (grantee, privilege, column) in &grants {
        let column = column.as_deref();
        let is_expected = expected
            .iter()
            .any(|&(role, wanted, on)| role == grantee && wanted == privilege && on == column);
        if !is_expected {
            let privilege = privilege_on(privilege, column);
            report.sql(
                Kind::Grant,
                &relation.path,
                format!("{grantee} has {privilege}"),
                format!("REVOKE {privilege} ON {} FROM {grantee};", relation.path),
            );
        }
    }
    if known.is_none() {
        return Ok(());
    }
    for (role, privilege, column) in expected {
        let there = grants.iter().any(|(grantee, found, on)| {
            grantee == role && found == privilege && on.as_deref() == column
        });
        if !there {
            let privilege = privilege_on(privilege, column);
            report.sql(
                Kind::Grant,
                &relation.path,
                format!("{role} has no {privilege}"),
                format!("GRANT {privilege} ON {} TO {role};", relation.path),
            );
        }
    }
    Ok(())
}

/// One table: whether row security is on, and by which policies.
async fn check_table(
    connection: &mut PgConnection,
    report: &mut Report,
    relation: &Relation,
    known: Option<&Table>,
) -> Result<(), StoreError> {
    let path = relation.path.as_str();
    if relation.persistence != "p" {
        report.sql(
            Kind::Oddity,
            path,
            "is not logged, so a crash of the server empties it",
            format!("ALTER TABLE {path} SET LOGGED;"),
        );
    }
    if relation.kind != "r" {
        report.find(
            Kind::Oddity,
            path,
            "is a foreign or partitioned table, whose parts have a row security of their own",
            Mend::Advice("make it an ordinary table".to_owned()),
        );
        return Ok(());
    }
    let policies = policies_of(connection, relation).await?;
    let expected = match known {
        Some(table) if table.isolated => [ISOLATED, table.policies].concat(),
        Some(table) => table.policies.to_vec(),
        None if relation.has_workspace => ISOLATED.to_vec(),
        None => {
            report.sql(
                Kind::TableUnknown,
                path,
                "belongs to no workspace and is none of the hub's own tables",
                format!(
                    "REVOKE ALL ON {path} FROM PUBLIC, {APP_ROLE};\nALTER TABLE {path} SET SCHEMA public;"
                ),
            );
            return Ok(());
        }
    };
    if expected.is_empty() && policies.is_empty() && !relation.enabled {
        return Ok(());
    }
    if relation.has_workspace && policies.is_empty() && !relation.enabled {
        report.sql(
            Kind::NotIsolated,
            path,
            "belongs to a workspace, and no row security closes it",
            format!("CALL connect.isolate('{path}');"),
        );
        return Ok(());
    }
    if !relation.enabled {
        report.sql(
            Kind::NotEnabled,
            path,
            "row security is not enabled",
            format!("ALTER TABLE {path} ENABLE ROW LEVEL SECURITY;"),
        );
    }
    if !relation.forced {
        report.sql(
            Kind::NotForced,
            path,
            "row security does not bind the owner",
            format!("ALTER TABLE {path} FORCE ROW LEVEL SECURITY;"),
        );
    }
    for wanted in &expected {
        match policies.iter().find(|policy| policy.name == wanted.name) {
            None => report.sql(
                Kind::PolicyMissing,
                path,
                format!("has no policy {} for {} by {}", wanted.name, wanted.command, wanted.role),
                create_policy(path, wanted),
            ),
            Some(policy) if policy.is(wanted) => {}
            Some(policy) => report.sql(
                Kind::PolicyChanged,
                path,
                format!("policy {} is {policy}", wanted.name),
                format!(
                    "DROP POLICY {} ON {path};\n{}",
                    policy.quoted,
                    create_policy(path, wanted)
                ),
            ),
        }
    }
    for policy in &policies {
        if !expected.iter().any(|wanted| wanted.name == policy.name) {
            report.sql(
                Kind::PolicyUnknown,
                path,
                format!("policy {} is {policy}", policy.name),
                format!("DROP POLICY {} ON {path};", policy.quoted),
            );
        }
    }
    Ok(())
}

/// A policy as it is.
#[derive(Debug, sqlx::FromRow)]
struct FoundPolicy {
    name: String,
    quoted: String,
    command: String,
    roles: String,
    permissive: bool,
    using: Option<String>,
    check: Option<String>,
}

impl FoundPolicy {
    fn is(&self, wanted: &Policy) -> bool {
        self.permissive
            && self.command == wanted.command
            && self.roles == wanted.role
            && self.using.as_deref() == wanted.using
            && self.check.as_deref() == wanted.check
    }
}

impl std::fmt::Display for FoundPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.permissive { "" } else { "restrictive " };
        write!(f, "{kind}for {} by {}", self.command, self.roles)?;
        if let Some(using) = &self.using {
            write!(f, " using {using}")?;
        }
        if let Some(check) = &self.check {
            write!(f, " with check {check}")?;
        }
        Ok(())
    }
}

async fn policies_of(
    connection: &mut PgConnection,
    relation: &Relation,
) -> Result<Vec<FoundPolicy>, StoreError> {
    let policies = sqlx::query_as(
        "SELECT p.polname::text AS name, quote_ident(p.polname) AS quoted,
                CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                              WHEN 'd' THEN 'DELETE' ELSE 'ALL' END AS command,
                (SELECT string_agg(CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END, ', ')
                 FROM unnest(p.polroles) r) AS roles,
                p.polpermissive AS permissive,
                pg_get_expr(p.polqual, p.polrelid) AS using,
                pg_get_expr(p.polwithcheck, p.polrelid) AS check
         FROM pg_policy p WHERE p.polrelid = $1 ORDER BY 1",
    )
    .bind(relation.oid)
    .fetch_all(connection)
    .await?;
    Ok(policies)
}

fn create_policy(path: &str, policy: &Policy) -> String {
    let mut sql = format!(
        "CREATE POLICY {} ON {path} FOR {} TO {}",
        policy.name, policy.command, policy.role
    );
    if let Some(using) = policy.using {
        sql.push_str(&format!(" USING ({using})"));
    }
    if let Some(check) = policy.check {
        sql.push_str(&format!(" WITH CHECK ({check})"));
    }
    sql.push(';');
    sql
}

/// Ways past the row security of a table: views, rules, triggers, heirs.
async fn check_links(connection: &mut PgConnection, report: &mut Report) -> Result<(), StoreError> {
    let views: Vec<(String, String)> = sqlx::query_as(
        "SELECT DISTINCT c.oid::regclass::text, c.relkind::text
         FROM pg_class c LEFT JOIN pg_rewrite w ON w.ev_class = c.oid
         LEFT JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
                              AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> c.oid
         LEFT JOIN pg_class t ON t.oid = d.refobjid
         WHERE c.relkind IN ('v', 'm')
           AND 'connect'::regnamespace IN (c.relnamespace, t.relnamespace) ORDER BY 1",
    )
    .fetch_all(&mut *connection)
    .await?;
    for (view, kind) in views {
        let kind = if kind == "m" { "MATERIALIZED VIEW" } else { "VIEW" };
        report.sql(
            Kind::View,
            &view,
            "is a view over the hub's tables, and sees with its owner's eyes",
            format!("DROP {kind} {view};"),
        );
    }
    let rules: Vec<(String, String)> = sqlx::query_as(
        "SELECT quote_ident(w.rulename), c.oid::regclass::text FROM pg_rewrite w
         JOIN pg_class c ON c.oid = w.ev_class
         WHERE c.relnamespace = 'connect'::regnamespace AND c.relkind IN ('r', 'p') ORDER BY 1",
    )
    .fetch_all(&mut *connection)
    .await?;
    for (rule, path) in rules {
        report.sql(
            Kind::Oddity,
            &path,
            format!("rule {rule} rewrites what is done with it"),
            format!("DROP RULE {rule} ON {path};"),
        );
    }
    let triggers: Vec<(String, String)> = sqlx::query_as(
        "SELECT quote_ident(t.tgname), c.oid::regclass::text FROM pg_trigger t
         JOIN pg_class c ON c.oid = t.tgrelid
         WHERE c.relnamespace = 'connect'::regnamespace AND NOT t.tgisinternal ORDER BY 1",
    )
    .fetch_all(&mut *connection)
    .await?;
    for (trigger, path) in triggers {
        report.sql(
            Kind::Oddity,
            &path,
            format!("trigger {trigger} sees or changes what is written to it"),
            format!("DROP TRIGGER {trigger} ON {path};"),
        );
    }
    let heirs: Vec<(String, String, bool)> = sqlx::query_as(
        "SELECT i.inhrelid::regclass::text, i.inhparent::regclass::text, c.relispartition
         FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent
         WHERE c.relkind IN ('r', 'p', 'f') AND 'connect'::regnamespace IN (c.relnamespace, p.relnamespace)
         ORDER BY 1",
    )
    .fetch_all(connection)
    .await?;
    for (child, parent, is_partition) in heirs {
        let sql = if is_partition {
            format!("ALTER TABLE {parent} DETACH PARTITION {child};")
        } else {
            format!("ALTER TABLE {child} NO INHERIT {parent};")
        };
        report.sql(
            Kind::Oddity,
            &child,
            format!("is a part of {parent}: who is asked for one gets rows of the other"),
            sql,
        );
    }
    report.checked.push("views, rules, triggers and heirs of the tables".to_owned());
    Ok(())
}

/// Foreign keys and uniqueness, which row security does not bind.
async fn check_keys(
    connection: &mut PgConnection,
    report: &mut Report,
    relations: &[Relation],
) -> Result<(), StoreError> {
    let references: Vec<(String, String, String, String, String)> = sqlx::query_as(
        "SELECT k.conrelid::regclass::text, quote_ident(k.conname), k.confrelid::regclass::text,
                (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY u.n) FROM unnest(k.conkey) WITH ORDINALITY u (col, n)
                 JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.col),
                (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY u.n) FROM unnest(k.confkey) WITH ORDINALITY u (col, n)
                 JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.col)
         FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
         WHERE k.contype = 'f' AND c.relnamespace = 'connect'::regnamespace
           AND NOT EXISTS (
               SELECT FROM unnest(k.conkey, k.confkey) u (mine, theirs)
               JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.mine AND a.attname = 'workspace_id'
               JOIN pg_attribute b ON b.attrelid = k.confrelid AND b.attnum = u.theirs AND b.attname = 'workspace_id')
         ORDER BY 1, 2",
    )
    .fetch_all(&mut *connection)
    .await?;
    for (path, name, target, columns, targets) in references {
        report.sql(
            Kind::ForeignKey,
            &path,
            format!(
                "foreign key {name} does not name the workspace, so it can point into another one"
            ),
            format!(
                "ALTER TABLE {path} DROP CONSTRAINT {name};\n\
                 ALTER TABLE {path} ADD CONSTRAINT {name} FOREIGN KEY (workspace_id, {columns}) \
                 REFERENCES {target} (workspace_id, {targets});"
            ),
        );
    }
    check_references(connection, report, relations).await?;
    let uniques: Vec<(String, String, Option<String>)> = sqlx::query_as(
        "SELECT i.indrelid::regclass::text, i.indexrelid::regclass::text,
                (SELECT quote_ident(k.conname) FROM pg_constraint k WHERE k.conindid = i.indexrelid
                 AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u', 'x'))
         FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
         JOIN pg_attribute w ON w.attrelid = c.oid AND w.attname = 'workspace_id' AND NOT w.attisdropped
         WHERE c.relnamespace = 'connect'::regnamespace AND i.indisunique
           AND NOT w.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) ORDER BY 1, 2",
    )
    .fetch_all(connection)
    .await?;
    for (path, index, constraint) in uniques {
        let sql = match constraint {
            Some(name) => format!("ALTER TABLE {path} DROP CONSTRAINT {name};"),
            None => format!("DROP INDEX {index};"),
        };
        report.sql(
            Kind::Unique,
            &path,
            format!("{index} is unique over all workspaces, so one can probe for rows of another"),
            sql,
        );
    }
    report
        .checked
        .push("foreign keys and unique indexes: whether each names the workspace".to_owned());
    Ok(())
}

/// Foreign keys that should be there: without them a row could outlive what it belongs to, or name what is
/// not there.
async fn check_references(
    connection: &mut PgConnection,
    report: &mut Report,
    relations: &[Relation],
) -> Result<(), StoreError> {
    let found: Vec<(String, String, String, bool)> = sqlx::query_as(
        "SELECT k.conrelid::regclass::text, quote_ident(k.conname), pg_get_constraintdef(k.oid), k.convalidated
         FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
         WHERE k.contype = 'f' AND c.relnamespace = 'connect'::regnamespace ORDER BY 1, 2",
    )
    .fetch_all(&mut *connection)
    .await?;
    for relation in relations.iter().filter(|relation| relation.has_workspace) {
        let path = relation.path.as_str();
        let known = TABLES.iter().find(|table| table.name == relation.name);
        let own = known.map(|table| table.references).unwrap_or_default();
        let to_workspace = (relation.name != "workspaces").then_some(TO_WORKSPACE);
        for wanted in to_workspace.iter().chain(own) {
            let is_it = |says: &str| says.strip_suffix(" NOT VALID").unwrap_or(says) == *wanted;
            if !found.iter().any(|(of, _, says, _)| of == path && is_it(says)) {
                report.sql(
                    Kind::ForeignKey,
                    path,
                    format!("has no {wanted}"),
                    format!("ALTER TABLE {path} ADD {wanted};"),
                );
            }
        }
    }
    for (path, name, _, _) in found.iter().filter(|(.., is_valid)| !is_valid) {
        report.sql(
            Kind::ForeignKey,
            path,
            format!("foreign key {name} was not checked for the rows that were there"),
            format!("ALTER TABLE {path} VALIDATE CONSTRAINT {name};"),
        );
    }
    let asleep: Vec<(String,)> = sqlx::query_as(
        "SELECT DISTINCT c.oid::regclass::text FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
         WHERE c.relnamespace = 'connect'::regnamespace AND t.tgisinternal AND t.tgenabled NOT IN ('O', 'A')
         ORDER BY 1",
    )
    .fetch_all(connection)
    .await?;
    for (path,) in asleep {
        report.sql(
            Kind::ForeignKey,
            &path,
            "its foreign keys, or those to it, are switched off",
            format!("ALTER TABLE {path} ENABLE TRIGGER ALL;"),
        );
    }
    Ok(())
}

/// Statements around one that needs a role's rights: whoever runs it must be a member of the role, and the
/// role able to create in the schema, for this moment.
fn as_role(role: &str, statement: &str) -> String {
    format!(
        "GRANT {role} TO CURRENT_USER;\n\
         GRANT CREATE ON SCHEMA connect TO {role};\n\
         {statement}\n\
         REVOKE CREATE ON SCHEMA connect FROM {role};\n\
         REVOKE {role} FROM CURRENT_USER;"
    )
}

/// Statements that give a function to a role.
fn give_away(function: &str, role: &str) -> String {
    as_role(role, &format!("ALTER ROUTINE {function} OWNER TO {role};"))
}

/// One function or procedure.
#[derive(Debug, sqlx::FromRow)]
struct Routine {
    signature: String,
    owner: String,
    definer: bool,
    pinned: bool,
    body: String,
    /// Who may call it besides its owner.
    callers: Vec<String>,
}

/// Functions that see more than their caller, and who may call what.
async fn check_functions(
    connection: &mut PgConnection,
    report: &mut Report,
) -> Result<(), StoreError> {
    let routines: Vec<Routine> = sqlx::query_as(
        "SELECT p.oid::regprocedure::text AS signature, p.proowner::regrole::text AS owner,
                p.prosecdef AS definer, coalesce(p.proconfig @> ARRAY[$1], false) AS pinned,
                p.prosrc AS body,
                ARRAY(SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
                      FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                      WHERE a.grantee <> p.proowner ORDER BY 1) AS callers
         FROM pg_proc p WHERE p.pronamespace = 'connect'::regnamespace ORDER BY 1",
    )
    .bind(PINNED)
    .fetch_all(connection)
    .await?;
    for Function { signature, .. } in FUNCTIONS {
        if !routines.iter().any(|routine| routine.signature == *signature) {
            report.find(
                Kind::Function,
                *signature,
                "is not there",
                Mend::Advice("restore it from a backup: `connect-hub restore`".to_owned()),
            );
        }
    }
    for routine in &routines {
        let name = routine.signature.as_str();
        let listed = FUNCTIONS.iter().find(|function| function.signature == name);
        let definer = listed.and_then(|function| function.definer);
        if routine.definer && definer.is_none() {
            report.sql(
                Kind::Function,
                name,
                format!("sees what {} sees, whoever calls it, and is none of the hub's", routine.owner),
                format!("ALTER ROUTINE {name} SECURITY INVOKER;\nREVOKE ALL ON ROUTINE {name} FROM PUBLIC;"),
            );
            continue;
        }
        if let Some(made) = definition(name).filter(|made| made.body != routine.body) {
            let statement = made.statement;
            report.sql(
                Kind::Function,
                name,
                "does something else than the function that the migrations make",
                definer.map_or_else(|| statement.clone(), |role| as_role(role, &statement)),
            );
            continue;
        }
        if let Some(role) = definer {
            if !routine.definer {
                report.sql(
                    Kind::Function,
                    name,
                    "sees only what its caller sees",
                    format!("ALTER ROUTINE {name} SECURITY DEFINER;"),
                );
            }
            if routine.owner != role {
                report.sql(
                    Kind::Function,
                    name,
                    format!("belongs to {} and not to {role}", routine.owner),
                    give_away(name, role),
                );
            }
        }
        if listed.is_some() && !routine.pinned {
            report.sql(
                Kind::Function,
                name,
                "has no pinned search path",
                format!("ALTER ROUTINE {name} SET search_path = pg_catalog, pg_temp;"),
            );
        }
        let allowed = listed.map(|function| function.caller);
        for caller in &routine.callers {
            if Some(caller.as_str()) != allowed {
                report.sql(
                    Kind::Function,
                    name,
                    format!("{caller} may call it"),
                    format!("REVOKE ALL ON ROUTINE {name} FROM {caller};"),
                );
            }
        }
        if let Some(allowed) = allowed
            && !routine.callers.iter().any(|caller| caller == allowed)
        {
            report.sql(
                Kind::Function,
                name,
                format!("{allowed} may not call it"),
                format!("GRANT EXECUTE ON ROUTINE {name} TO {allowed};"),
            );
        }
    }
    let definers: Vec<&str> = FUNCTIONS
        .iter()
        .filter(|function| function.definer.is_some())
        .map(|function| function.signature)
        .collect();
    report
        .checked
        .push(format!("functions that see more than their caller: {}", definers.join(", ")));
    Ok(())
}
