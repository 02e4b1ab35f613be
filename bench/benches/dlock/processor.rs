//! One processor for those who take turns: on different ones a round trip takes 35 µs or 125 µs, by where the scheduler
//! puts client and server, and that stays with a connection.

use diesel::sql_types::BigInt;
use diesel::{Connection, MysqlConnection, QueryableByName, RunQueryDsl};
use dlock_tests::{Kind, Server};

use crate::report::Section;
use crate::session::{Api, Locker, Session};

/// As long as there is one, this thread and those that it starts run on one processor, together with what serves the
/// sessions that were [brought](Self::bring) there.
pub(crate) struct OneProcessor {
    /// Or why there is none.
    place: Result<affinity::Place, String>,
}

impl OneProcessor {
    pub(crate) fn enter() -> Self {
        Self {
            place: affinity::Place::enter(),
        }
    }

    /// A session that is served here.
    pub(crate) fn open(&mut self, api: Api, server: &Server, key: &str) -> Box<dyn Session> {
        let mut session = api.open(server, key);
        self.bring(server, &mut *session);
        session
    }

    pub(crate) fn bring(&mut self, server: &Server, session: &mut (impl Locker + ?Sized)) {
        self.bring_id(server, session.id());
    }

    /// The session that the server calls `id`.
    pub(crate) fn bring_id(&mut self, server: &Server, id: i64) {
        let Ok(place) = &mut self.place else { return };
        if let Err(error) = os_id(server, id).and_then(|id| place.bring(id)) {
            self.place = Err(format!("{}: {error}", server.name));
        }
    }

    /// Says where it was measured.
    pub(crate) fn tell(&self, section: &mut Section) {
        section.paragraph(&match &self.place {
            Ok(_) => {
                "Clients and what serves them share one processor, so that a round trip always takes the same and is as \
                 short as it can be: the ratio is one of work. Over a network it is nearer to 1."
                    .to_owned()
            }
            Err(error) => format!(
                "Clients and what serves them run on any processor, so that ratios between two connections are not to be \
                 trusted: {error}."
            ),
        });
    }
}

/// The number of the process or thread that serves a session.
fn os_id(server: &Server, id: i64) -> Result<i64, String> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = BigInt)]
        os_id: i64,
    }
    let of_thread = match server.kind {
        Kind::Postgres => return Ok(id),
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql if server.is_mariadb() => {
            "SELECT CAST(TID AS SIGNED) AS os_id FROM information_schema.PROCESSLIST WHERE ID = "
        }
        Kind::Mysql => {
            "SELECT CAST(THREAD_OS_ID AS SIGNED) AS os_id FROM performance_schema.threads WHERE PROCESSLIST_ID = "
        }
    };
    let mut conn = MysqlConnection::establish(&server.url).map_err(|error| error.to_string())?;
    diesel::sql_query(format!("{of_thread}{id}"))
        .get_result(&mut conn)
        .map(|Row { os_id }| os_id)
        .map_err(|error| error.to_string())
}

#[cfg(target_os = "linux")]
mod affinity {
    use std::fs;

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    const THIS_THREAD: Pid = Pid::from_raw(0);

    pub(super) struct Place {
        before: CpuSet,
        here: CpuSet,
        /// And where they were before.
        brought: Vec<(Pid, CpuSet)>,
    }

    impl Place {
        pub(super) fn enter() -> Result<Self, String> {
            let before = sched_getaffinity(THIS_THREAD).map_err(|error| error.to_string())?;
            // The last one: the first has the machine's interrupts.
            let last = (0..CpuSet::count()).rfind(|&number| before.is_set(number).unwrap_or(false));
            let mut here = CpuSet::new();
            here.set(last.ok_or("no processor")?)
                .and_then(|()| sched_setaffinity(THIS_THREAD, &here))
                .map_err(|error| error.to_string())?;
            Ok(Self {
                before,
                here,
                brought: Vec::new(),
            })
        }

        pub(super) fn bring(&mut self, id: i64) -> Result<(), String> {
            // A server elsewhere has numbers of its own.
            let name = fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
            if !["postgres", "mysqld", "mariadbd"]
                .iter()
                .any(|server| name.contains(server))
            {
                return Err(format!("{id} is no server's process on this machine"));
            }
            let pid = Pid::from_raw(id.try_into().map_err(|_| format!("no process: {id}"))?);
            let before = sched_getaffinity(pid).map_err(|error| error.to_string())?;
            sched_setaffinity(pid, &self.here).map_err(|error| error.to_string())?;
            self.brought.push((pid, before));
            Ok(())
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            // MySQL keeps threads for sessions to come. Those that have ended need no place.
            for (pid, before) in self.brought.iter().chain([&(THIS_THREAD, self.before)]) {
                let _ = sched_setaffinity(*pid, before);
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod affinity {
    pub(super) struct Place;

    impl Place {
        pub(super) fn enter() -> Result<Self, String> {
            Err("only Linux can be asked for it".into())
        }

        pub(super) fn bring(&mut self, _id: i64) -> Result<(), String> {
            unreachable!("BUG: nobody has entered")
        }
    }
}
