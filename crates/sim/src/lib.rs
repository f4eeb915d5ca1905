//! Two hosts, a link and a guest on one machine: what demos, tests and benches run on.
//!
//! | module | for |
//! |---|---|
//! | [`link`] | one direction of a link in virtual time: rate, queue, delay, jitter, loss, cut; no I/O, no clock |
//! | [`relay`] | the shell around it: a thread that joins two TAP interfaces by two such links |
//! | [`namespace`] | doing something inside a network namespace |
//! | [`lab`] | the whole set-up: host a, host b, the link between them, and the network of the guests |
//! | [`guest_image`] | the kernel and initramfs that test guests boot |
//! | [`older_qemu`] | QEMU 7.2, beside the one that is installed |
//! | [`observer`] | a client outside the guest: its progress, its beat, its memory check |
//! | [`beats`] | the guest's beats, and through which host each of them came |
//! | [`qmp`] | a small blocking QMP client, independent of the product's own |
//! | [`simulator`] | the product's cores in virtual time: whole migrations and everything that can fail, from a seed |
//!
//! Nothing of the product depends on this crate (its tests do). The simulator runs the product's cores; the rest depends
//! on nothing of the product: what it measures can't be wrong in the same way. It needs root, for network namespaces
//! and TAPs.

pub mod beats;
pub mod guest_image;
pub mod lab;
pub mod link;
pub mod namespace;
pub mod observer;
pub mod older_qemu;
pub mod qmp;
pub mod relay;
pub mod simulator;
pub mod tap;
pub mod web_client;
