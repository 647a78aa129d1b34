"""The tests that take most of the time: ``-m "not slow"`` leaves them out, and has some of every room left."""

SLOW = {
    "blocks": {
        "test_blocks": ["test_contract_of_variants"],
        "test_plugins": [],
    },
    "cli": {
        "test_bad_input": ["test_a_full_disk_leaves_nothing_behind"],
        "test_cli_files": [
            "test_a_good_block_beside_them_works",
            "test_an_adapter_is_written_and_put_onto_the_backbone_again",
            "test_code_in_a_plan_needs_trust",
            "test_eject_writes_the_original",
        ],
        "test_export": [
            "test_a_plain_network_in_every_format",
            "test_a_plan_is_applied_before_trained_weights_are_loaded",
            "test_a_trained_injected_pickle",
            "test_an_adapter_goes_onto_its_backbone",
            "test_the_inputs_are_the_plan_s_and_inferred_ones_are_said",
        ],
        "test_inject": [
            "test_a_name_gives_a_file_of_that_name",
            "test_all_formats_at_once_compute_the_same",
        ],
        "test_output": [
            "test_blocks_on_a_network",
            "test_latency_of_the_copies_for_inference",
            "test_the_grid_is_drawn_and_no_file_replaced",
        ],
        "test_worker": [],
    },
    "exporting": {
        "test_dimensions": [],
        "test_exporting": [],
        "test_scripting": ["test_nothing_of_ours_frees_an_operator"],
        "test_writing": [
            "test_a_full_disk_is_an_error_without_debris",
            "test_a_write_that_the_system_cuts_short_is_an_error_without_debris",
            "test_a_writer_killed_at_any_time_leaves_a_whole_file",
            "test_a_writer_killed_before_the_last_step_leaves_the_old_file_or_none",
        ],
    },
    "gates": {
        "test_excitations": ["test_memory_does_not_grow_with_the_data"],
    },
    "inference": {
        "test_inference": [
            "test_errors",
            "test_files",
            "test_functional_and_shared_ones",
            "test_networks_of_the_zoos",
        ],
    },
    "isolation": {
        "test_worker": [],
    },
    "kernels": {
        "test_kernels": [],
    },
    "loading": {
        "test_arguments": ["test_calls_that_end_a_process_end_none_as_programs"],
        "test_blocks_in_files": ["test_text_that_unfolds_in_the_parser"],
        "test_checkpoints": [
            "test_injected_models_come_back",
            "test_the_number_of_classes_is_that_of_the_weights",
            "test_whole_networks_come_back",
        ],
        "test_entries": ["test_notes_of_a_process_of_its_own"],
        "test_files": [
            "test_an_exported_program",
            "test_programs_of_classes_that_a_script_defines",
            "test_torchscript",
        ],
        "test_fuzz": ["test_damaged_files"],
        "test_hostile": [],
        "test_isolated": [
            "test_errors_come_back_as_what_they_are",
            "test_nothing_is_imported_from_the_current_folder",
            "test_the_network_comes_back",
            "test_weights_of_a_named_network_are_read_there",
        ],
        "test_leaves": [
            "test_a_confined_process_can_not_hand_it_over",
            "test_in_an_archive",
            "test_in_an_exported_program",
            "test_operators_off_the_list_need_trust",
        ],
        "test_program_details": [],
        "test_programs": [],
        "test_unfolding": [
            "test_stored_forwards_are_counted",
            "test_what_states_unfold_to_is_counted",
        ],
    },
    "pictures": {
        "test_pictures": [
            "test_a_long_network_is_folded_and_quick_to_draw",
            "test_pictures_of_known_networks_are_whole",
        ],
    },
    "plans": {
        "test_bounds": ["test_many_inputs"],
        "test_budget": ["test_the_choice_is_the_best_of_all_plans"],
        "test_grid": [
            "test_a_picture_of_the_grid",
            "test_every_block_on_a_network_costs_what_its_plan_costs",
            "test_every_cell_is_what_its_plan_costs",
        ],
        "test_plan_files": ["test_reading_agrees_with_the_schema_and_never_ends_in_anything_but_our_errors"],
        "test_plans": [
            "test_parameters_of_resnet50_at_every_position",
            "test_positions_compute_the_formulas",
            "test_positions_start_as_identities",
        ],
        "test_shortfall": ["test_an_error_names_the_units_that_can_take_no_block"],
    },
    "sites": {
        "test_sites": [
            "test_a_name_that_the_authors_forward_reads_is_left_to_it",
            "test_stages",
        ],
    },
    "surgery": {
        "test_fuse": [
            "test_files_hold_plain_operators",
            "test_trained_the_outputs_and_gradients_are_those_of_the_unfused",
        ],
        "test_methods": [
            "test_a_fresh_process_reads_the_network_before_its_class_was_ever_made",
            "test_a_method_of_a_child_holds_the_blocks_of_the_child",
            "test_files_have_them",
        ],
        "test_surgery": [
            "test_a_pickle_computes_the_same_in_a_fresh_process",
            "test_compile_computes_the_same",
            "test_two_processes_train_it",
        ],
        "test_torch_facilities": [],
    },
    "tests": {
        "test_adapters": [
            "test_a_forged_adapter_changes_nothing",
            "test_an_adapter_of_resnet50_is_a_tenth_of_it",
            "test_another_network_is_refused",
            "test_other_weights_are_warned_of_or_refused",
            "test_there_and_back_is_bit_exact",
        ],
        "test_census": [
            "test_comes_out_the_same",
            "test_planned",
        ],
        "test_examples": [],
        "test_guarding": ["test_networks_out_of_files_are_used_as_ever"],
        "test_hazards": [],
        "test_paper": [
            "test_counts_of_the_released_networks",
            "test_identity_start_is_bit_equal_in_eval_and_in_train",
            "test_macs_are_2cw_for_each_site_and_agree_with_torchs_counter",
            "test_table_10_reduction_ratios_of_resnet50",
            "test_table_13_one_stage_at_a_time",
            "test_timms_se_twin_has_the_same_keys_weights_and_outputs",
            "test_vgg16_has_thirteen_sites_after_the_non_linearities",
        ],
        "test_properties": [],
        "test_random_numbers": ["test_checking_a_block_leaves_the_generators"],
        "test_readme": [],
        "test_strangers": [],
        "test_testing": ["test_each_breach_is_found_by_its_check"],
        "test_training": [
            "test_a_compiled_network_is_compiled_again_without_blocks",
            "test_a_compiled_training_step",
            "test_a_distributed_checkpoint_is_loaded_back",
            "test_blocks_are_off_inside_and_on_outside",
            "test_what_is_exported_inside_has_no_blocks_and_what_was_before_has",
        ],
        "test_twins": [],
    },
    "tracing": {
        "test_containers": ["test_a_container_in_a_fresh_process"],
        "test_memory": ["test_a_real_call_takes_as_much_memory_as_a_plain_one"],
        "test_numbers": ["test_they_are_in_every_file"],
    },
    "verification": {
        "test_learning": [
            "test_every_block_can_learn_from_the_start",
            "test_values_of_any_size_leave_a_unit_on",
        ],
    },
}
"""Folder → file → its slow tests; all of the file where none is named."""
