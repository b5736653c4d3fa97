"""Facts of the benchmarks: categories of subjects as their authors define them, and published scores."""

from __future__ import annotations

_CEVAL = {
    "STEM": """computer_network operating_system computer_architecture college_programming college_physics
        college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer
        metrology_engineer high_school_mathematics high_school_physics high_school_chemistry high_school_biology
        middle_school_mathematics middle_school_biology middle_school_physics middle_school_chemistry
        veterinary_medicine""",
    "social science": """college_economics business_administration marxism mao_zedong_thought education_science
        teacher_qualification high_school_politics high_school_geography middle_school_politics
        middle_school_geography""",
    "humanities": """modern_chinese_history ideological_and_moral_cultivation logic law
        chinese_language_and_literature art_studies professional_tour_guide legal_professional high_school_chinese
        high_school_history middle_school_history""",
    "other": """civil_servant sports_science plant_protection basic_medicine clinical_medicine
        urban_and_rural_planner accountant fire_engineer environmental_impact_assessment_engineer tax_accountant
        physician""",
    "hard": """advanced_mathematics discrete_mathematics probability_and_statistics college_chemistry college_physics
        high_school_mathematics high_school_chemistry high_school_physics""",
}
_CMMLU = {
    "STEM": """anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics
        college_medical_statistics computer_science conceptual_physics electrical_engineering elementary_mathematics
        genetics high_school_biology high_school_chemistry high_school_mathematics high_school_physics
        machine_learning virology""",
    "humanities": """arts chinese_history chinese_literature college_law global_facts international_law jurisprudence
        logical marxist_theory philosophy professional_law world_history world_religions""",
    "social science": """ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture
        chinese_foreign_policy chinese_teacher_qualification college_education economics education elementary_chinese
        ethnology high_school_geography high_school_politics journalism management marketing modern_chinese
        professional_accounting professional_psychology public_relations security_study sociology""",
    "other": """agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security
        construction_project_management elementary_commonsense elementary_information_and_technology food_science
        human_sexuality legal_and_moral_basis nutrition professional_medicine sports_science
        traditional_chinese_medicine""",
    "China specific": """ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture
        chinese_foreign_policy chinese_history chinese_literature chinese_teacher_qualification
        construction_project_management elementary_chinese elementary_commonsense ethnology high_school_politics
        modern_chinese traditional_chinese_medicine""",
}
CATEGORIES = {
    benchmark: {category: frozenset(names.split()) for category, names in table.items()}
    for benchmark, table in {"ceval": _CEVAL, "cmmlu": _CMMLU}.items()
}
"""Subjects of each category, by benchmark; a subject may be in several (``hard``, ``China specific``). MMLU's are in
the harness."""

PUBLISHED = {
    "Steel-LLM-1B-Chat": (41.90, 36.08),
    "Steel-LLM-1B-Chat DPO": (42.04, 36.04),
    "TinyLlama-1.1B": (25.02, 24.03),
    "MiniCPM-1.2B": (49.14, 46.81),
    "Qwen1.5-1.8B-Chat": (56.84, 54.11),
    "Phi2": (23.37, 24.18),
    "Gemma-2b-it": (32.30, 33.07),
    "CT-LLM-SFT-2B": (41.54, 41.48),
    "ChatGLM-6B": (38.90, 37.48),
    "Llama2-7B": (32.42, 31.11),
    "OLMo-7B": (35.18, 35.55),
    "Gemma-7B": (42.57, 44.20),
    "MAP-Neo-7B": (56.97, 55.01),
    "Llama2-13B": (37.32, 37.06),
}
"""Table 4 of the Steel-LLM paper: C-Eval and CMMLU, in percent."""
PUBLISHED_COLUMNS = ("ceval", "cmmlu")
