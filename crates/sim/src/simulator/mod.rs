//! Whole migrations in virtual time.

pub mod disk;
