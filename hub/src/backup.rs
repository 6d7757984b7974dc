//! Backups: `pg_dump` in its custom format, read back to see that every row is there; and the way back,
//! which takes the rows from a backup and the schema from this program.
//!
//! A dump under row security by a role that sees nothing is empty and succeeds. So the backup is made as
//! [`BACKUP_ROLE`], the catalogue is asked first whether that role sees all, and the rows in the file are
//! counted against those in the very snapshot that was dumped.
//!
//! A backup is data and never code: a restore runs the migrations up to the version of the backup, copies
//! the rows in under it, and runs the later ones. All of it is one transaction.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _,
    postgres::{PgConnectOptions, PgConnection, PgSslMode},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
};

use crate::{
    cluster::{client_program, last_lines},
    limits::COPY_CHUNK_BYTES,
    store::{self, BACKUP_ROLE, StoreError, catalog},
};

/// Certificate bundles of the common systems: `libpq` before version 16 needs a file, and `sqlx` finds it
/// by itself.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The schema version that made [`BACKUP_ROLE`].
const FIRST_VERSION: i64 = 5;

/// Why there is no backup, or no restored database.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// PostgreSQL's client programs are not installed, or older than the server.
    #[error("`{program}` of version {major} or later is not found")]
    NoProgram {
        /// Which one.
        program: &'static str,
        /// The version of the server.
        major: i32,
    },
    /// One of them said no.
    #[error("{program} said: {message}")]
    Program {
        /// Which one.
        program: &'static str,
        /// The end of what it printed.
        message: String,
    },
    /// The backup would lack rows.
    #[error("{BACKUP_ROLE} does not see every row of {0}, so a backup would lack some")]
    Blind(String),
    /// The role of the connection is not the owner.
    #[error("the role of this connection cannot become {BACKUP_ROLE}")]
    NotOwner,
    /// The schema is of a version that cannot be backed up, or restored, by this program.
    #[error(
        "the schema has version {found}; this program knows versions {FIRST_VERSION} to {newest}"
    )]
    Version {
        /// The version that was found.
        found: i64,
        /// The newest that this program knows.
        newest: i64,
    },
    /// The file does not hold what the database held.
    #[error("the backup holds {saved} rows of {table}, and the database {rows}")]
    Incomplete {
        /// The table.
        table: String,
        /// Rows in the snapshot that was dumped.
        rows: i64,
        /// Rows in the file.
        saved: i64,
    },
    /// The file is no backup of a hub.
    #[error("`{}` is no backup of a hub: {why}", path.display())]
    NoBackup {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// There is data that would be lost.
    #[error("the database holds a hub's data already")]
    NotEmpty,
    /// Sessions of a hub would lose the ground under their feet.
    #[error("{0} sessions of {app} are connected: a hub serves from this database", app = store::APP_ROLE)]
    InUse(i64),
    /// A file operation failed.
    #[error("`{}`", path.display())]
    Io {
        /// On which path.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// The database refused something.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for BackupError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

impl BackupError {
    /// What a person can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoProgram { .. } => Some(
                "install PostgreSQL's client programs (Debian, Ubuntu: `apt install postgresql-client`), or name \
                 their directory in CONNECT_HUB_PG_BIN"
                    .to_owned(),
            ),
            Self::Blind(_) => Some("`connect-hub doctor` says what to mend".to_owned()),
            Self::NotOwner => Some("give the owner's URL, which `connect-hub migrate` gets".to_owned()),
            Self::Version { found, newest } if found < newest => {
                Some("run `connect-hub migrate` first".to_owned())
            }
            Self::Version { .. } => Some("use the newer connect-hub that made it".to_owned()),
            Self::NotEmpty => Some("--replace deletes it and takes what the backup holds".to_owned()),
            Self::InUse(_) => Some("stop the hub first".to_owned()),
            Self::Store(error) => error.hint().map(str::to_owned),
            Self::Program { .. } | Self::Incomplete { .. } | Self::NoBackup { .. } | Self::Io { .. } => None,
        }
    }
}

/// Attaches the path to an IO error.
fn at(path: &Path) -> impl FnOnce(io::Error) -> BackupError + '_ {
    move |source| BackupError::Io { path: path.to_owned(), source }
}

/// How many rows each table has.
pub type Rows = Vec<(String, i64)>;

/// Writes every row of the hub's database to `file`, which is replaced only by a whole backup.
///
/// `options` are the owner's.
///
/// # Errors
/// [`BackupError`].
pub async fn backup(options: &PgConnectOptions, file: &Path) -> Result<Rows, BackupError> {
    let mut owner = store::open(options).await?;
    let (found, newest) = (store::version(&mut owner).await?, store::latest_version());
    if !(FIRST_VERSION..=newest).contains(&found) {
        return Err(BackupError::Version { found, newest });
    }
    let (major, is_reader): (i32, bool) = sqlx::query_as(
        "SELECT current_setting('server_version_num')::int / 10000, pg_has_role($1, 'MEMBER')",
    )
    .bind(BACKUP_ROLE)
    .fetch_one(&mut owner)
    .await?;
    if !is_reader {
        return Err(BackupError::NotOwner);
    }
    let mut snapshot = owner.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    sqlx::raw_sql("SET LOCAL ROLE connect_backup").execute(&mut *snapshot).await?;
    if let Some(table) = catalog::first_unreadable(&mut snapshot).await? {
        return Err(BackupError::Blind(table));
    }
    let (name,): (String,) =
        sqlx::query_as("SELECT pg_export_snapshot()").fetch_one(&mut *snapshot).await?;
    let mut rows = Rows::new();
    for table in tables(&mut snapshot).await? {
        let count = AssertSqlSafe(format!("SELECT count(*) FROM {}", table.path));
        let (count,): (i64,) = sqlx::query_as(count).fetch_one(&mut *snapshot).await?;
        rows.push((table.name, count));
    }

    let (pg_dump, pg_restore) = (find("pg_dump", major).await?, find("pg_restore", major).await?);
    let partial = Partial::create(file)?;
    let mut dump = client(&pg_dump);
    dump.args(["--format=custom", "--schema=connect", "--enable-row-security", "--no-password"])
        .args(["--lock-wait-timeout=10000", "--role", BACKUP_ROLE, "--snapshot", &name])
        .envs(libpq(options))
        .stdout(partial.file.try_clone().map_err(at(&partial.path))?);
    let dumping = dump.stderr(Stdio::piped()).kill_on_drop(true).spawn().map_err(at(&pg_dump))?;
    let output = dumping.wait_with_output().await.map_err(at(&pg_dump))?;
    if !output.status.success() {
        return Err(BackupError::Program {
            program: "pg_dump",
            message: last_lines(&output.stderr),
        });
    }
    snapshot.rollback().await?;

    for (table, count) in &rows {
        let mut archive = Archive::open(&pg_restore, &partial.path, table).await?;
        let mut saved = 0;
        while archive.next_row().await?.is_some() {
            saved += 1;
        }
        if saved != *count {
            return Err(BackupError::Incomplete { table: table.clone(), rows: *count, saved });
        }
    }
    partial.keep(file)?;
    Ok(rows)
}

/// Puts what `file` holds into the database of `options`, which are the owner's.
///
/// # Errors
/// [`BackupError`]; nothing is changed then.
pub async fn restore(
    options: &PgConnectOptions,
    file: &Path,
    replace: bool,
) -> Result<Rows, BackupError> {
    let no_backup =
        |why: &str| BackupError::NoBackup { path: file.to_owned(), why: why.to_owned() };
    fs::File::open(file).map_err(at(file))?;
    let mut owner = store::open(options).await?;
    let (major,): (i32,) =
        sqlx::query_as("SELECT current_setting('server_version_num')::int / 10000")
            .fetch_one(&mut owner)
            .await?;
    let pg_restore = find("pg_restore", major).await?;
    let saved = saved_tables(&pg_restore, file).await?;
    let version =
        saved_version(&pg_restore, file).await?.ok_or_else(|| no_backup("it has no version"))?;
    let newest = store::latest_version();
    if !(FIRST_VERSION..=newest).contains(&version) {
        return Err(BackupError::Version { found: version, newest });
    }

    let mut tx = owner.begin().await?;
    make_room(&mut tx, replace).await?;
    store::migrate_to(&mut tx, version).await?;
    let tables = tables(&mut tx).await?;
    let tables = in_order_of_references(&mut tx, tables).await?;
    if let Some(unknown) =
        saved.iter().find(|name| !tables.iter().any(|table| table.name == **name))
    {
        return Err(no_backup(&format!("table `{unknown}` is none of version {version}")));
    }
    let mut rows = Rows::new();
    for table in tables.iter().filter(|table| table.name != "schema_history") {
        if !saved.contains(&table.name) {
            return Err(no_backup(&format!("table `{}` is not in it", table.name)));
        }
        let count = load(&mut tx, &pg_restore, file, table).await?;
        rows.push((table.name.clone(), count));
    }
    // What later versions make of the rows.
    store::migrate(&mut tx).await?;
    tx.commit().await?;
    Ok(rows)
}

/// Removes an empty schema, or with `replace` any.
async fn make_room(tx: &mut PgConnection, replace: bool) -> Result<(), BackupError> {
    let (there,): (bool,) = sqlx::query_as(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'connect')",
    )
    .fetch_one(&mut *tx)
    .await?;
    if !there {
        return Ok(());
    }
    let (sessions,): (i64,) = sqlx::query_as(
        "SELECT count(*) FROM pg_catalog.pg_stat_activity
         WHERE datname = current_database() AND usename = 'connect_app'",
    )
    .fetch_one(&mut *tx)
    .await?;
    if sessions > 0 {
        return Err(BackupError::InUse(sessions));
    }
    if !replace {
        let version = store::version(&mut *tx).await?;
        // Before there was a role that sees the rows, one cannot tell that there are none.
        if (1..FIRST_VERSION).contains(&version) {
            return Err(BackupError::NotEmpty);
        }
        sqlx::raw_sql("SET LOCAL ROLE connect_backup").execute(&mut *tx).await?;
        for table in tables(&mut *tx).await? {
            let any = AssertSqlSafe(format!("SELECT EXISTS (SELECT FROM {})", table.path));
            let (any,): (bool,) = sqlx::query_as(any).fetch_one(&mut *tx).await?;
            if any && table.name != "schema_history" {
                return Err(BackupError::NotEmpty);
            }
        }
        sqlx::raw_sql("RESET ROLE").execute(&mut *tx).await?;
    }
    sqlx::raw_sql("DROP SCHEMA connect CASCADE").execute(&mut *tx).await?;
    Ok(())
}

/// A table of the schema.
#[derive(Debug, Clone, sqlx::FromRow)]
struct Table {
    name: String,
    /// Qualified and quoted.
    path: String,
    /// Quoted names.
    columns: Vec<String>,
    secured: bool,
}

async fn tables(connection: &mut PgConnection) -> Result<Vec<Table>, BackupError> {
    let tables = sqlx::query_as(
        "SELECT c.relname::text AS name, format('%I.%I', n.nspname, c.relname) AS path,
                ARRAY(SELECT quote_ident(a.attname) FROM pg_catalog.pg_attribute a
                      WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
                c.relforcerowsecurity AS secured
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = 'connect' AND c.relkind = 'r' ORDER BY 1",
    )
    .fetch_all(connection)
    .await?;
    Ok(tables)
}

/// Tables after those that they refer to.
async fn in_order_of_references(
    connection: &mut PgConnection,
    mut tables: Vec<Table>,
) -> Result<Vec<Table>, BackupError> {
    let mut references: Vec<(String, String)> = sqlx::query_as(
        "SELECT c.relname::text, t.relname::text FROM pg_catalog.pg_constraint k
         JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_class t ON t.oid = k.confrelid
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = 'connect' AND k.contype = 'f' AND k.conrelid <> k.confrelid",
    )
    .fetch_all(connection)
    .await?;
    let mut ordered = Vec::with_capacity(tables.len());
    while !tables.is_empty() {
        let (ready, waiting): (Vec<_>, Vec<_>) = tables
            .into_iter()
            .partition(|table| !references.iter().any(|(from, _)| *from == table.name));
        if ready.is_empty() {
            // Tables that refer to each other in a circle: the foreign keys will say so.
            ordered.extend(waiting);
            break;
        }
        references.retain(|(_, to)| !ready.iter().any(|table| table.name == *to));
        ordered.extend(ready);
        tables = waiting;
    }
    Ok(ordered)
}

/// Copies the rows of one table in. The owner may write under row security while it is not forced, and
/// that ends before anybody else sees it.
async fn load(
    tx: &mut PgConnection,
    pg_restore: &Path,
    file: &Path,
    table: &Table,
) -> Result<i64, BackupError> {
    let force =
        |word: &str| AssertSqlSafe(format!("ALTER TABLE {} {word} ROW LEVEL SECURITY", table.path));
    let mut archive = Archive::open(pg_restore, file, &table.name).await?;
    if let Some(column) = archive.columns.iter().find(|column| !table.columns.contains(column)) {
        return Err(BackupError::NoBackup {
            path: file.to_owned(),
            why: format!("table `{}` has a column {column}", table.name),
        });
    }
    if table.secured {
        sqlx::raw_sql(force("NO FORCE")).execute(&mut *tx).await?;
    }
    let copy = format!("COPY {} ({}) FROM STDIN", table.path, archive.columns.join(", "));
    let mut sink = tx.copy_in_raw(&copy).await?;
    let mut chunk = Vec::with_capacity(COPY_CHUNK_BYTES);
    let end = loop {
        match archive.next_row().await {
            Ok(Some(row)) => {
                chunk.extend_from_slice(row);
                if chunk.len() >= COPY_CHUNK_BYTES {
                    sink.send(chunk.as_slice()).await?;
                    chunk.clear();
                }
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    if let Err(error) = end {
        sink.abort("the backup cannot be read").await?;
        return Err(error);
    }
    sink.send(chunk.as_slice()).await?;
    let rows = sink.finish().await?;
    if table.secured {
        sqlx::raw_sql(force("FORCE")).execute(&mut *tx).await?;
    }
    Ok(i64::try_from(rows).unwrap_or(i64::MAX))
}

/// The tables whose rows a backup has.
async fn saved_tables(pg_restore: &Path, file: &Path) -> Result<Vec<String>, BackupError> {
    let mut list = client(pg_restore);
    list.arg("--list").arg(file);
    let output = list.output().await.map_err(at(pg_restore))?;
    if !output.status.success() {
        let why = last_lines(&output.stderr);
        return Err(BackupError::NoBackup { path: file.to_owned(), why });
    }
    // `3406; 0 16405 TABLE DATA connect agents postgres`
    let listed = String::from_utf8_lossy(&output.stdout);
    let tables = listed.lines().filter_map(|line| {
        let (_, entry) = line.split_once(" TABLE DATA connect ")?;
        entry.rsplit_once(' ').map(|(name, _)| name.to_owned())
    });
    Ok(tables.collect())
}

/// The schema version of a backup, if it is one of this program's history.
async fn saved_version(pg_restore: &Path, file: &Path) -> Result<Option<i64>, BackupError> {
    let mut archive = Archive::open(pg_restore, file, "schema_history").await?;
    let Some(column) = archive.columns.iter().position(|column| column == "version") else {
        return Ok(None);
    };
    let mut newest = None;
    while let Some(row) = archive.next_row().await? {
        let row = String::from_utf8_lossy(row);
        let version = row.trim_end().split('\t').nth(column).and_then(|field| field.parse().ok());
        newest = newest.max(version);
    }
    Ok(newest)
}

/// The rows of one table in a backup, as `COPY` takes them.
struct Archive {
    program: Child,
    out: BufReader<ChildStdout>,
    /// Quoted names.
    columns: Vec<String>,
    line: Vec<u8>,
}

impl Archive {
    async fn open(pg_restore: &Path, file: &Path, table: &str) -> Result<Self, BackupError> {
        let mut restore = client(pg_restore);
        restore.args(["--data-only", "--schema=connect", "--file=-", "--table", table]).arg(file);
        restore.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut program = restore.spawn().map_err(at(pg_restore))?;
        let out = program.stdout.take().map(BufReader::new);
        let out = out.ok_or_else(|| BackupError::Program {
            program: "pg_restore",
            message: "it has no output".to_owned(),
        })?;
        let mut archive = Self { program, out, columns: Vec::new(), line: Vec::new() };
        // The script's settings come first; none of them is run.
        loop {
            if !archive.read_line().await? {
                let message = archive.complaint().await;
                return Err(BackupError::NoBackup {
                    path: file.to_owned(),
                    why: format!("no rows of table `{table}`; {message}"),
                });
            }
            let line = String::from_utf8_lossy(&archive.line);
            let columns = line
                .strip_prefix("COPY connect.")
                .and_then(|rest| rest.trim_end().strip_suffix(") FROM stdin;"))
                .and_then(|rest| rest.split_once(" ("));
            if let Some((_, columns)) = columns {
                archive.columns = columns.split(", ").map(str::to_owned).collect();
                return Ok(archive);
            }
        }
    }

    /// The next line; false at the end.
    async fn read_line(&mut self) -> Result<bool, BackupError> {
        self.line.clear();
        let read = self.out.read_until(b'\n', &mut self.line).await;
        Ok(read.map_err(at(Path::new("pg_restore")))? > 0)
    }

    /// The next row, with its line end.
    async fn next_row(&mut self) -> Result<Option<&[u8]>, BackupError> {
        if !self.read_line().await? {
            let message = self.complaint().await;
            return Err(BackupError::Program { program: "pg_restore", message });
        }
        if self.line != b"\\.\n" {
            return Ok(Some(&self.line));
        }
        // The rows are there; whether they are all that was saved, its status says.
        while self.read_line().await? {}
        let status = self.program.wait().await.map_err(at(Path::new("pg_restore")))?;
        if status.success() {
            return Ok(None);
        }
        let message = self.complaint().await;
        Err(BackupError::Program { program: "pg_restore", message })
    }

    /// What the program says about its early end.
    async fn complaint(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = &mut self.program.stderr {
            // Without its words there is still the fact.
            let _ = stderr.read_to_end(&mut text).await;
        }
        last_lines(&text)
    }
}

/// A file that takes its place only when it is whole; removed otherwise.
struct Partial {
    path: PathBuf,
    file: fs::File,
}

impl Partial {
    fn create(target: &Path) -> Result<Self, BackupError> {
        let mut name = target.as_os_str().to_owned();
        name.push(".partial");
        let path = PathBuf::from(name);
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(at(&path))?;
        Ok(Self { path, file })
    }

    fn keep(self, target: &Path) -> Result<(), BackupError> {
        self.file.sync_all().map_err(at(&self.path))?;
        fs::rename(&self.path, target).map_err(at(target))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Gone when it was kept.
        let _ = fs::remove_file(&self.path);
    }
}

/// One of PostgreSQL's client programs that speaks to a server of this version.
async fn find(program: &'static str, major: i32) -> Result<PathBuf, BackupError> {
    let server = u32::try_from(major).unwrap_or_default();
    client_program(program, server).await.ok_or(BackupError::NoProgram { program, major })
}

/// A client program without our `PG…` variables: they were taken into the connection's options.
fn client(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"PG") {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// A connection as `libpq` reads it from the environment, which only this user and root can see; an
/// argument list is open to everybody.
fn libpq(options: &PgConnectOptions) -> Vec<(&'static str, String)> {
    let host = options.get_socket().map_or_else(
        || options.get_host().to_owned(),
        |socket| socket.to_string_lossy().into_owned(),
    );
    let mode = match options.get_ssl_mode() {
        PgSslMode::Disable => "disable",
        PgSslMode::Allow => "allow",
        PgSslMode::Prefer => "prefer",
        PgSslMode::Require => "require",
        PgSslMode::VerifyCa => "verify-ca",
        PgSslMode::VerifyFull => "verify-full",
    };
    let database = options.get_database().unwrap_or(options.get_username());
    let mut environment = vec![
        ("PGHOST", host),
        ("PGPORT", options.get_port().to_string()),
        ("PGUSER", options.get_username().to_owned()),
        ("PGDATABASE", database.to_owned()),
        ("PGSSLMODE", mode.to_owned()),
        ("PGAPPNAME", "connect-hub backup".to_owned()),
    ];
    let mut url = options.to_url_lossy();
    let mut has_root = false;
    for (key, value) in url.query_pairs() {
        let name = match &*key {
            "sslrootcert" => "PGSSLROOTCERT",
            "sslcert" => "PGSSLCERT",
            "sslkey" => "PGSSLKEY",
            _ => continue,
        };
        // One that was given by its text has no file, and `libpq` takes files.
        let Some(path) = value.strip_prefix("file: ") else { continue };
        has_root |= name == "PGSSLROOTCERT";
        environment.push((name, path.to_owned()));
    }
    let verifies = matches!(options.get_ssl_mode(), PgSslMode::VerifyCa | PgSslMode::VerifyFull);
    if verifies && !has_root {
        let bundle = CA_BUNDLES.iter().find(|path| Path::new(path).exists());
        environment.push(("PGSSLROOTCERT", bundle.unwrap_or(&"system").to_string()));
    }
    // The URL spells each special character in percents, which a query undoes.
    if let Some(query) = url.password().map(|password| format!("password={password}")) {
        url.set_query(Some(&query));
        let password = url.query_pairs().next().map(|(_, password)| password.into_owned());
        environment.extend(password.map(|password| ("PGPASSWORD", password)));
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_what_the_url_said() {
        let url = "postgres://own%40er:p%40s%25s%20+w%3D%26@db.example:6543/the%20hub?sslmode=verify-ca&sslrootcert=/etc/ca.pem";
        let environment = libpq(&url.parse().unwrap());
        for (name, value) in [
            ("PGHOST", "db.example"),
            ("PGPORT", "6543"),
            ("PGUSER", "own@er"),
            ("PGPASSWORD", "p@s%s +w=&"),
            ("PGDATABASE", "the hub"),
            ("PGSSLMODE", "verify-ca"),
            ("PGSSLROOTCERT", "/etc/ca.pem"),
        ] {
            let found: Vec<_> = environment.iter().filter(|(key, _)| *key == name).collect();
            assert_eq!(found, [&(name, value.to_owned())], "{name}");
        }
    }
}
